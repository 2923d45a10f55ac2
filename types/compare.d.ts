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
}
