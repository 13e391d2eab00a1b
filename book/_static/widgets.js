// Loaded right after require.js on pages with widgets: finds every module inside the book.
(function () {
  const vendor = new URL("vendor", document.currentScript.src).href;
  require.config({
    paths: {
      "@jupyter-widgets": vendor + "/html-manager",
      "@jupyter-widgets/html-manager/dist": vendor + "/html-manager",
      anywidget: vendor + "/anywidget/index",
    },
  });
})();

// Widgets typeset their labels through MathJax 2's queue; the book has MathJax 3.
document.addEventListener("DOMContentLoaded", function () {
  if (!window.MathJax) return;
  MathJax.Hub = {
    Queue: ([, , element]) =>
      MathJax.startup.promise.then(() => MathJax.typesetPromise([element])),
  };
});
