// @ts-check
/** Short messages in ComfyUI's own way, which differs between its versions. */

/** @param {Comfy.App} app @param {Comfy.ToastKind} kind @param {string} summary @param {string} [detail] */
export function toast(app, kind, summary, detail) {
  const found = app.extensionManager.toast;
  if (typeof found?.add === "function") {
    found.add({ severity: kind, summary, detail, life: kind === "error" ? 10000 : 5000 });
    return;
  }
  const show = found?.[kind] ?? (kind === "warn" ? found?.warning : undefined);
  if (typeof show === "function") show.call(found, summary, detail ? { description: detail } : undefined);
}
