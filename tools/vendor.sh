#!/bin/bash
# Fetches what the built book serves itself, so that no page asks another host for anything:
# MathJax, require.js and the ipywidgets html-manager from the npm registry, anywidget's browser
# file from the installed wheel, each with its licence, and the one of the icons that the theme and
# the html-manager use. Run it from the repository root after changing a version here.
set -euo pipefail
dest=book/_static/vendor
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

fetch() { # fetch PACKAGE VERSION: unpacks the npm package into $tmp/PACKAGE
    mkdir -p "$tmp/$1"
    (cd "$tmp" && tar -xzf "$(npm pack --silent "$1@$2" 2>/dev/null | tail -1)" -C "$1" --strip-components 1)
}

rm -rf "$dest"
fonts=$dest/mathjax/output/chtml/fonts/woff-v2
mkdir -p "$dest/html-manager" "$dest/anywidget" "$dest/fontawesome" "$(dirname "$fonts")"
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp "$site/anywidget/nbextension/index.js" "$site"/anywidget-*.dist-info/licenses/LICENSE "$dest/anywidget/"

fetch mathjax 3.2.2
cp "$tmp/mathjax/es5/tex-chtml-full.js" "$tmp/mathjax/LICENSE" "$dest/mathjax/"
cp -r "$tmp/mathjax/es5/output/chtml/fonts/woff-v2" "$fonts"
{
    echo "Copyright (c) 2009-2010 Design Science, Inc., with Reserved Font Names MathJax_*"
    echo "Copyright (c) 2017 The MathJax Consortium"
    echo
    cat tools/OFL-1.1.txt
} > "$fonts/LICENSE.txt"

fetch requirejs 2.3.8
cp "$tmp/requirejs/require.js" "$dest/"
# its licence is in the file's first lines, by name; the words of the MIT licence are anywidget's
{ sed -n '2,3s/^ \* //p' "$dest/require.js"; sed 1,3d "$dest/anywidget/LICENSE"; } > "$dest/require.js.LICENSE.txt"

fetch @jupyter-widgets/html-manager 1.0.15
manager="$tmp/@jupyter-widgets/html-manager/dist"
cp "$manager/embed-amd.js" "$manager"/*.woff2 "$dest/html-manager/"
cp "$site"/ipywidgets-*.dist-info/licenses/LICENSE "$dest/html-manager/" # same project and licence
# embed.js holds the same packages, and its source map names them
.venv/bin/python tools/bundle_licences.py "$manager/embed.js.map" "$manager/embed.js.LICENSE.txt" \
    > "$dest/html-manager/embed-amd.js.LICENSE.txt"

# Font Awesome: version 5 in the html-manager, version 6 in the theme, which serves its fonts from
# the folder vendor/fontawesome
fetch @fortawesome/fontawesome-free 5.15.4
cp "$tmp/@fortawesome/fontawesome-free/LICENSE.txt" "$dest/html-manager/fontawesome.LICENSE.txt"
rm -r "$tmp/@fortawesome"
fetch @fortawesome/fontawesome-free 6.5.2
cp "$tmp/@fortawesome/fontawesome-free/LICENSE.txt" "$dest/fontawesome/"
