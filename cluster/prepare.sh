#!/usr/bin/env bash
# Makes what `ray up` sends to the nodes; run it before every `ray up`:  cluster/prepare.sh cluster/aws.yaml
#
# build/cluster      the wheel of this checkout, constraints.txt, setup-node.sh and node-env.sh. A folder of its own
#                    because Ray reads every byte of what file_mounts names to see whether it changed: of the whole
#                    checkout that would be .venv and workspace too.
# ~/.llm4msr-cluster the tokens, made once, readable by you alone. They are in no file of the repository.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
secrets=$HOME/.llm4msr-cluster
python=${PYTHON:-$repository/.venv/bin/python}
if [ $# -ne 1 ] || [ ! -f "$1" ]; then
  echo "usage: cluster/prepare.sh FILE.yaml   (found: $*)" >&2
  exit 2
fi
# In comments the word may stand.
if open=$(grep -nE '^[^#]*CHANGE-ME' "$1"); then
  printf '%s: still to be set, see docs/cluster.md:\n%s\n' "$1" "$open" >&2
  exit 1
fi

(umask 077 && mkdir -p "$secrets")
for name in auth_token serve_tokens; do
  if [ ! -s "$secrets/$name" ]; then
    (umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(32))' > "$secrets/$name")
  fi
done
chmod 700 "$secrets" && chmod 600 "$secrets"/*

# From a copy: setuptools would put into the wheel what an earlier build left in build/lib, removed modules too.
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
cd "$repository"
cp -r pyproject.toml README.md LICENSE llm4msr jobs serve "$sources"
rm -rf build/cluster && mkdir -p build/cluster
# The fixed time makes equal sources an equal file: `ray up` then finds nothing to do on nodes that run.
SOURCE_DATE_EPOCH=315532800 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --wheel-dir build/cluster "$sources"
cp constraints.txt cluster/setup-node.sh cluster/node-env.sh build/cluster/
echo "build/cluster is ready: $(ls build/cluster | tr '\n' ' ')"
