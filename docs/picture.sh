#!/bin/sh
# Take a picture of a report (needs chromium): sh docs/picture.sh REPORT.html PICTURE.png [WIDTH HEIGHT]
set -eu
report=$(realpath "$1")
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run \
	--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars \
	--user-data-dir="$profile" --window-size="${3:-1100},${4:-2400}" --screenshot="$2" \
	"file://$report" 2>/dev/null
echo "wrote $2"
