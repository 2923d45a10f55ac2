// @ts-check
/** Whether somebody can see an element: the browser shows its tab, and it is in view. */

/**
 * @param {Element} element @param {(isVisible: boolean) => void} onChange called whenever it has changed
 * @returns {() => void} ends it; onChange is told that the element is not visible any more
 */
export function watchVisible(element, onChange) {
  let isInView = false;
  let isVisible = false;

  function tell(isShown = isInView && document.visibilityState === "visible") {
    if (isShown === isVisible) return;
    isVisible = isShown;
    onChange(isShown);
  }
  const observer = new IntersectionObserver((entries) => {
    isInView = entries[entries.length - 1].isIntersecting;
    tell();
  });
  const onVisibility = () => tell();
  observer.observe(element);
  document.addEventListener("visibilitychange", onVisibility);
  return () => {
    observer.disconnect();
    document.removeEventListener("visibilitychange", onVisibility);
    tell(false);
  };
}
