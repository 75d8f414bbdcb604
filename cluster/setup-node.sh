#!/usr/bin/env bash
# Installs the locked dependencies and this project on a node: ~/llm4msr-env. setup_commands of all cluster files.
#
# Lies on the node in ~/llm4msr, beside the wheel and constraints.txt that prepare.sh packed. Can be run again at any
# time: what is installed already is found without a network, so a second `ray up`, or a host or an image on which it
# ran before, is quick.
set -euo pipefail

package=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
environment=$HOME/llm4msr-env
extras=${LLM4MSR_EXTRAS:-embedded,openai}
constraints=$package/constraints.txt
# The newest: what prepare.sh removed here stays on the node, for rsync deletes nothing.
wheel=$(ls -t "$package"/llm4msr-*.whl | head -n 1)

# The environment of its own keeps the lock exact: what an image or a host has installed for itself stays out.
[ -x "$environment/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$environment"
pip=("$environment/bin/python" -m pip install --quiet --no-input --disable-pip-version-check)

# torch first and by its exact version: as somebody's dependency it could be another build. The build on PyPI brings
# CUDA, 3 GB that a node without a GPU would fetch each time it starts. Without --no-deps pip would look for all of
# torch's dependencies on the CPU builds' index, which lacks most of the locked versions.
if nvidia-smi -L >/dev/null 2>&1; then
  "${pip[@]}" -c "$constraints" torch
else
  "${pip[@]}" -c "$constraints" --no-deps --index-url https://download.pytorch.org/whl/cpu torch
fi
"${pip[@]}" -c "$constraints" "$wheel[$extras]"
# Once more, alone: pip leaves an installed package of the same version as it is, whatever has changed in its code.
"${pip[@]}" --no-deps --force-reinstall "$wheel"

# All nodes of a cluster, and the machine that gives it jobs, must run the same Ray.
locked=$(sed -n 's/^ray==//p' "$constraints")
installed=$("$environment/bin/python" -c 'from importlib.metadata import version; print(version("ray"))')
if [ "$installed" != "$locked" ]; then
  echo "setup-node.sh: Ray $installed is installed in $environment, constraints.txt has $locked" >&2
  exit 1
fi

line=". \"$package/node-env.sh\""
grep -qxF "$line" "$HOME/.bashrc" 2>/dev/null || echo "$line" >> "$HOME/.bashrc"
