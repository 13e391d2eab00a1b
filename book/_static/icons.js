// Keeps the <i> element of every icon (the default replaces it), as the widgets' Play button needs.
window.FontAwesomeConfig = { autoReplaceSvg: "nest" };
