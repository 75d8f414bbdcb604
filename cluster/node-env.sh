# What every process of Ray finds in its environment, on every node of a cluster made by `ray up`.
#
# setup-node.sh adds a line to ~/.bashrc that reads this file; every command of `ray up`, `ray exec` and `ray attach`
# runs in a shell that reads ~/.bashrc. So it holds before `ray start`, which is when Ray looks, and in every later
# shell as well: `ray status` needs the token too.

# A job's `python` is the one on PATH when Ray was started on the node, not the one that runs Ray.
export PATH="$HOME/llm4msr-env/bin:$PATH"

# Without the token nobody reaches the dashboard, the jobs or another node: who reaches them can run any code.
# The file comes by ssh, see file_mounts; Ray's default place, ~/.ray, would switch the token on for all other Rays
# of the same user on a host of your own.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$HOME/llm4msr-secrets/auth_token"

# Ray's token does not guard the served ranker (port 8000): its callers need one of the tokens in this file.
export LLM4MSR_TOKENS_FILE="$HOME/llm4msr-secrets/serve_tokens"

# Requests go through HAProxy straight to the replicas: several times faster than the default proxy. Ray Serve wants
# the same answer on all nodes, the head too.
export RAY_SERVE_ENABLE_HA_PROXY=1
export RAY_SERVE_THROUGHPUT_OPTIMIZED=1
# Without it, who asks a replica that hangs waits for ever; with it, for a second more than request_timeout_s.
export RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S=6

# `ray job stop` sends SIGTERM and, so many seconds later, SIGKILL. In between training writes a checkpoint; Ray's own
# 3 seconds are too few for that.
export RAY_JOB_STOP_WAIT_TIME_S=60

# Where no instance role gives access to S3 (hosts of your own, MinIO): keys, region and endpoint_url in the format of
# ~/.aws/config. Without the metadata service switched off, clients wait for an address that nobody answers.
if [ -f "$HOME/llm4msr-secrets/aws_config" ]; then
  export AWS_CONFIG_FILE="$HOME/llm4msr-secrets/aws_config"
  export AWS_EC2_METADATA_DISABLED=true
fi
