/** What Snug's server sends of compared pictures. */
declare namespace Snug {
  /** A picture that ComfyUI's server has. */
  interface PictureFile {
    filename: string;
    subfolder: string;
    type: "temp";
  }

  /** Against the first picture; numbers are null where there are none. */
  interface Score {
    identical: boolean;
    psnr: number | null;
    ssim: number | null;
    lpips: number | null;
  }

  /** files, scores: for each place in the batch; a single file stands for all, no scores: of another size. */
  interface Picture {
    caption: string;
    width: number;
    height: number;
    files: PictureFile[];
    scores: Score[];
  }

  interface Comparison {
    count: number;
    pictures: Picture[];
    notes: string[];
  }

  interface BlindResult {
    right: number;
    wrong: number;
    undecided: number;
    p_value: number;
    low: number;
    high: number;
    sentence: string;
  }

  /** 0: cannot tell. 1, 2: the picture on the left, on the right. */
  type Vote = 0 | 1 | 2;

  /** trials: the pictures on the left and on the right. quantized: where they were, null until the end. */
  interface BlindRound {
    round: string;
    name: string;
    file: string;
    width: number;
    height: number;
    trials: [PictureFile, PictureFile][];
    votes: (Vote | null)[];
    finished: boolean;
    result: BlindResult | null;
    quantized: (1 | 2)[] | null;
    /** Only from the node itself. */
    notes?: string[];
  }
}
