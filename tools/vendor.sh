#!/bin/bash
# Fetches what the built book serves itself, so that no page asks another host for anything:
# MathJax, require.js and the ipywidgets html-manager from the npm registry, anywidget's browser
# file from the installed wheel. Run it from the repository root after changing a version here.
set -euo pipefail
dest=book/_static/vendor
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

fetch() { # fetch PACKAGE VERSION: unpacks the npm package into $tmp/PACKAGE
    mkdir -p "$tmp/$1"
    (cd "$tmp" && tar -xzf "$(npm pack --silent "$1@$2" 2>/dev/null | tail -1)" -C "$1" --strip-components 1)
}

rm -rf "$dest"
mkdir -p "$dest/mathjax/output/chtml/fonts" "$dest/html-manager" "$dest/anywidget"

fetch mathjax 3.2.2
cp "$tmp/mathjax/es5/tex-chtml-full.js" "$tmp/mathjax/LICENSE" "$dest/mathjax/"
cp -r "$tmp/mathjax/es5/output/chtml/fonts/woff-v2" "$dest/mathjax/output/chtml/fonts/"

fetch requirejs 2.3.8 # its licence is in the file's first lines
cp "$tmp/requirejs/require.js" "$dest/"

fetch @jupyter-widgets/html-manager 1.0.15
manager="$tmp/@jupyter-widgets/html-manager"
cp "$manager/dist/embed-amd.js" "$manager"/dist/*.woff2 "$dest/html-manager/"

site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$site"/ipywidgets-*.dist-info/licenses/LICENSE "$dest/html-manager/" # same project and licence
cp "$site/anywidget/nbextension/index.js" "$site"/anywidget-*.dist-info/licenses/LICENSE "$dest/anywidget/"
