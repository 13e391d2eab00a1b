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
