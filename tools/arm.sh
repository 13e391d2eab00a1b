#!/bin/bash
# 64-bit Arm without an Arm machine: 20 greedy tokens of `tiny`, which must be those of this machine,
# and the tests of kernels, model and GGUF, under Debian 13's qemu-user. For Debian and its relatives
# on x86-64 with a network; installs nothing, all stays in _build/arm. About a quarter of an hour.
#   tools/arm.sh             PYTHON names a Python with this package (else .venv's)
#   tools/arm.sh TESTS       what to test instead, as pytest takes it
#   MIRROR=URL tools/arm.sh  where Debian's packages are, if this machine's own sources are others
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$PWD/_build/arm
root=$work/root
here=${PYTHON:-.venv/bin/python}
mirror=${MIRROR:-$(apt-get indextargets --format '$(SITE)' | head -1)}

# Debian 13's packages of one architecture and all that they need, unpacked into a folder
unpack() { # ARCHITECTURE FOLDER PACKAGE...
    local state=$work/apt-$1 folder=$2
    mkdir -p "$state/lists/partial" "$state/archives/partial" "$folder"
    touch "$state/status"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$state/sources"
    local options=(-qq -o "APT::Architecture=$1" -o "APT::Architectures=$1" -o APT::Sandbox::User=root
        -o Dir::Etc::SourceList="$state/sources" -o Dir::Etc::SourceParts=- -o Dir::State="$state"
        -o Dir::State::Lists="$state/lists" -o Dir::State::Status="$state/status"
        -o Dir::Cache="$state" -o Dir::Cache::Archives="$state/archives" -o Debug::NoLocking=1)
    apt-get "${options[@]}" update
    apt-get "${options[@]}" install --yes --download-only --no-install-recommends "${@:3}"
    local package
    for package in "$state"/archives/*.deb; do dpkg-deb -x "$package" "$folder"; done
}

if [ ! -e "$work/.ready" ]; then
    rm -rf "$work"
    unpack arm64 "$root" python3.13 libstdc++6
    ln -s usr/lib "$root/lib" # which the package base-files would do
    unpack amd64 "$work/host" qemu-user
    "$here" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], sep="\n")' >"$work/needed"
    "$here" -m pip install --quiet --target "$root/usr/local/lib/python3.13/dist-packages" \
        --only-binary=:all: --implementation cp --python-version 3.13 \
        --platform manylinux2014_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux_2_28_aarch64 -c requirements.lock -r "$work/needed" \
        hypothesis packaging pytest pytest-timeout
    touch "$work/.ready"
fi

# a Python that says of itself that it is this file, so that its children are emulated, too
cat >"$work/python" <<END
#!/bin/bash
export QEMU_CPU=max PYTHONHOME=/usr
exec "$work/host/usr/bin/qemu-aarch64" -0 "$work/python" -L "$root" "$root/usr/bin/python3.13" "\$@"
END
chmod +x "$work/python"
export PYTHONPATH=$PWD

kernel='
import platform
from bitnet_edu.kernels.simd import kernel_name, supported_kernels
print(platform.machine(), kernel_name(), supported_kernels())
assert platform.machine() == "aarch64"
assert {"sdot", "i8mm"} <= set(supported_kernels()), "not found: their tests would skip in silence"
'
tokens='
import bitnet_edu
model = bitnet_edu.load("tiny")
prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "What is a ternary weight?"}])
print(model.generate(prompt, max_new_tokens=20))
'
"$work/python" -c "$kernel"
expected=$("$here" -c "$tokens")
found=$("$work/python" -c "$tokens")
echo "here:   $expected"
echo "on Arm: $found"
[ "$expected" = "$found" ]
# not test_cache and test_threads: they start dozens of processes, and are not about the processor
[ $# -gt 0 ] || set -- tests/kernels/test_ladder.py tests/kernels/test_matmul.py \
    tests/kernels/test_screen.py tests/test_model.py tests/files/test_gguf.py
"$work/python" -m pytest -p no:cacheprovider --timeout=0 "$@"
