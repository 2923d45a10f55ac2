/** What Snug's server sends. Sizes are bytes, times seconds since the epoch. */
declare namespace Snug {
  type Part = "weights" | "pages" | "activations" | "cache" | "other" | "free";

  interface Device extends Record<Part, number> {
    name: string;
    title: string;
    total: number;
    is_gpu: boolean;
  }

  interface Model {
    name: string;
    device: string;
    formats: string[];
    on_device: number;
    offloaded: number;
    pinned: number;
    total: number;
    is_paged: boolean;
    last_node: string | null;
  }

  interface Sample {
    number: number;
    time: number;
    devices: Device[];
    models: Model[];
    running: string | null;
    /** Since the sample before; only in samples that are pushed. */
    events?: Event[];
  }

  interface Node {
    node_id: string;
    title: string;
    started: number;
    ended: number | null;
    before: Record<string, number>;
    peak: Record<string, number>;
    after: Record<string, number>;
    added: Record<string, number>;
    steps: number[];
    state: "running" | "done" | "stopped";
  }

  interface Point {
    time: number;
    weights: number;
    activations: number;
    pages: number;
    cache: number;
  }

  interface Prompt {
    prompt_id: string;
    device: string;
    started: number;
    ended: number | null;
    nodes: Node[];
    timeline: Point[];
  }

  interface Event {
    number: number;
    time: number;
    kind: "load" | "unload" | "oom" | "retry";
    model?: string | null;
    device?: string | null;
    bytes?: number | null;
    node?: string | null;
  }

  interface Counts {
    retries: number;
    ooms: number;
  }

  interface History {
    samples: Sample[];
    prompts: Prompt[];
    running: Prompt | null;
    events?: Event[];
    counters?: Record<string, Counts>;
  }

  interface FileChoice {
    folder: string;
    name: string;
  }

  interface Forecast {
    files: { name: string; weights_bytes?: number | null; error?: string | null }[];
    total_bytes: number;
    device: string;
    free_bytes: number;
    offloaded_bytes: number;
  }

  /** Of a model file, from its header. */
  interface Inspection {
    text: string;
    architecture: string | null;
    parameters: number;
    bytes: number;
    formats: { format: string; tensors: number; nbytes: number; bits_per_weight: number }[];
    groups: { name: string; tensors: number; bytes: number; blocks: Record<string, number> }[];
    choices: { format: string; reason: string }[];
    match: { model: string; missing: string[]; unexpected: string[] } | null;
    no_match: string;
    fit: { weights: number; offloaded: number; verdict: string; streaming: string } | null;
    notes: string[];
  }

  /** What the monitor node shows of its own report. */
  interface MonitorPeak {
    device: string;
    peak_bytes: number;
    node: string;
  }

  /** off: nobody looks. waiting: the server is away. unavailable: it has no telemetry. */
  type Connection = "off" | "connecting" | "live" | "waiting" | "unavailable";

  interface State {
    connection: Connection;
    /** Why the connection is as it is, for people; empty when all is well. */
    problem: string;
    samples: Sample[];
    /** Ended ones, the oldest first. */
    prompts: Prompt[];
    running: Prompt | null;
    events: Event[];
    counters: Record<string, Counts>;
    /** Of the first reading, so that only what came since is told. */
    firstCounters: Record<string, Counts>;
  }
}
