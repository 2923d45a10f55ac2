/** The part of ComfyUI's page that Snug uses; what only some versions have is optional. */
declare namespace Comfy {
  interface Widget {
    name: string;
    value: unknown;
    serialize?: boolean;
    element?: HTMLElement;
    /** values: what a combo offers. */
    options?: DOMWidgetOptions & { values?: unknown };
  }

  interface DOMWidgetOptions {
    serialize?: boolean;
    hideOnZoom?: boolean;
    getMinHeight?: () => number;
    getMaxHeight?: () => number;
  }

  interface Node {
    id: number | string;
    type: string | null;
    comfyClass?: string;
    title?: string;
    /** 0: as usual, 2: muted, 4: bypassed. */
    mode: number;
    widgets?: Widget[];
    subgraph?: Graph;
    graph?: Graph | null;
    size: ArrayLike<number>;
    /** Saved with the workflow. */
    properties: Record<string, any>;
    addDOMWidget(name: string, type: string, element: HTMLElement, options: DOMWidgetOptions): Widget;
    computeSize(): [number, number];
    setSize(size: [number, number]): void;
    onExecuted?: (output: any) => void;
    onConfigure?: (data: any) => void;
    onRemoved?: () => void;
  }

  interface Graph {
    nodes?: Node[];
    _nodes?: Node[];
  }

  interface Canvas {
    graph: Graph | null;
    subgraph?: Graph;
    setGraph(graph: Graph): void;
    centerOnNode(node: Node): void;
    selectNode?(node: Node): void;
    setDirty(foreground: boolean, background: boolean): void;
  }

  interface SidebarTab {
    id: string;
    icon: string;
    title: string;
    tooltip: string;
    label?: string;
    type: "custom";
    render(container: HTMLElement): void;
    destroy(): void;
  }

  interface ToastMessage {
    severity: "success" | "info" | "warn" | "error";
    summary: string;
    detail?: string;
    life?: number;
  }

  type ToastKind = "success" | "info" | "warn" | "error";
  type Toast = { add?: (message: ToastMessage) => void } & {
    [kind in ToastKind | "warning"]?: (summary: string, options?: { description?: string }) => void;
  };

  interface ExtensionManager {
    registerSidebarTab(tab: SidebarTab): void;
    toast?: Toast;
    sidebarTab?: { activeSidebarTabId?: string | null; toggleSidebarTab?(id: string): void };
    command?: { execute(id: string): void };
    workflow?: { activeWorkflow?: { changeTracker?: { checkState?(): void } } | null };
  }

  interface Extension {
    name: string;
    commands?: { id: string; label: string; icon?: string; tooltip?: string; function: () => void }[];
    menuCommands?: { path: string[]; commands: string[] }[];
    setup?(): void | Promise<void>;
    refreshComboInNodes?(): void;
    nodeCreated?(node: Node): void;
  }

  interface App {
    canvas?: Canvas;
    graph?: Graph;
    rootGraph?: Graph;
    extensionManager: ExtensionManager;
    registerExtension(extension: Extension): void;
  }

  interface Api {
    clientId?: string;
    apiURL?(route: string): string;
    fetchApi(route: string, options?: RequestInit): Promise<Response>;
    addEventListener(type: string, listener: (event: any) => void): void;
    removeEventListener(type: string, listener: (event: any) => void): void;
  }
}

declare module "*/scripts/app.js" {
  export const app: Comfy.App;
}

declare module "*/scripts/api.js" {
  export const api: Comfy.Api;
}
