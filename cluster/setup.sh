#!/usr/bin/env bash
# Makes a machine a node: ~/bgray-env from requirements.txt with bgray in it, and what a shell needs
# to find it. Everything is done once, and again only when what it was made from has changed; an image
# made of a machine where this ran holds the stamps, so that a node from it is ready in a second.
#
#   bash ~/bgray/cluster/setup.sh [head] [aws]
#
# head: this machine also runs the jobs' drivers. aws: it is an instance there, whose metadata service
# gives it its credentials; a head there also starts the others.
set -euo pipefail
export LC_ALL=C

PYTHON=3.12.16 # the same to the last digit on all nodes, or Ray refuses
UV=0.13.8
SOURCE=$HOME/bgray
ENV=$HOME/bgray-env
STATE=$HOME/.bgray # stamps, the log, what a shell reads

fail() {
  echo "bgray setup on $(hostname): $*" >&2
  exit 1
}

# step WHAT COMMAND...: silent when it works; else one line with the last one the command wrote.
step() {
  local what=$1 status=0
  shift
  echo "== $what" >> "$STATE/setup.log"
  "$@" < /dev/null >> "$STATE/setup.log" 2>&1 || status=$?
  [ "$status" = 0 ] && return
  fail "$what failed (exit $status): $(grep -v '^[[:space:]]*$' "$STATE/setup.log" | tail -n 1)" \
    "(all of it: $STATE/setup.log)"
}

# once NAME STAMP: whether NAME is still to be made from what STAMP describes.
once() { [ "$(cat "$STATE/$1" 2> /dev/null)" != "$2" ]; }
done_with() { echo "$2" > "$STATE/$1"; }

find_uv() {
  local place
  for place in "$(command -v uv || true)" "$HOME/.local/bin/uv" "$STATE/uv/bin/uv"; do
    [ -x "$place" ] && echo "$place" && return
  done
  return 1
}

install_uv() {
  # Ubuntu has pip without venv, or the reverse, or neither, depending on the image.
  uv_in_venv || python3 -m pip install --user --break-system-packages "uv==$UV" ||
    { # a fresh machine may be at its own upgrades
      sudo -n apt-get update
      sudo -n apt-get install -y -o DPkg::Lock::Timeout=300 python3-venv && uv_in_venv
    } ||
    { echo "none of python3 -m venv, pip and sudo apt-get install python3-venv works" && return 1; }
}
uv_in_venv() {
  python3 -m venv --clear "$STATE/uv" && "$STATE/uv/bin/pip" install "uv==$UV"
}

# Where Ray puts objects that memory does not hold: a local NVMe disk if there is one, for it is
# faster than the root volume and costs nothing extra.
spill_folder() {
  local base=/var/tmp disk
  if mountpoint -q /opt/dlami/nvme 2> /dev/null; then # AWS's Deep Learning images mount it there
    base=/opt/dlami/nvme
  elif mountpoint -q /mnt/nvme 2> /dev/null; then
    base=/mnt/nvme
  else
    disk=$(lsblk -dnpo NAME,MODEL 2> /dev/null | awk '/Instance Storage/ {print $1; exit}' || true)
    # Only a disk without any file system or partition is formatted.
    if [ -n "$disk" ] && [ "$(lsblk -no NAME "$disk" | wc -l)" = 1 ] && sudo -n true 2> /dev/null &&
      { sudo -n blkid "$disk" || sudo -n mkfs.ext4 -q "$disk"; } >> "$STATE/setup.log" 2>&1 &&
      sudo -n mkdir -p /mnt/nvme && sudo -n mount "$disk" /mnt/nvme >> "$STATE/setup.log" 2>&1; then
      base=/mnt/nvme
    fi
  fi
  mkdir -p "$base/bgray_spill" 2> /dev/null ||
    sudo -n install -d -m 700 -o "$(id -un)" "$base/bgray_spill" || return 1
  echo "$base/bgray_spill"
}

mkdir -p "$STATE"
for file in requirements.txt pyproject.toml bgray/__init__.py; do
  [ -f "$SOURCE/$file" ] || fail "$SOURCE/$file is not there: file_mounts of the cluster file lack it"
done
uv=$(find_uv) || {
  step "installing uv $UV" install_uv
  uv=$(find_uv) || fail "uv is installed but not to be found"
}

requirements="$PYTHON $(sha256sum < "$SOURCE/requirements.txt")"
if once requirements "$requirements" || ! [ -x "$ENV/bin/python" ]; then
  # A half-made environment must not keep the stamps of a whole one.
  rm -f "$STATE/requirements" "$STATE/package" "$STATE/aws"
  # uv's own Python: the system's often lacks the headers, without which torch.compile fails, and its
  # version is that of the image.
  "$ENV/bin/python" -c "import sys; sys.exit('%d.%d.%d' % sys.version_info[:3] != '$PYTHON')" \
    2> /dev/null ||
    step "making $ENV" "$uv" venv --clear --managed-python --python "$PYTHON" "$ENV"
  step "installing requirements.txt" "$uv" pip sync --python "$ENV/bin/python" "$SOURCE/requirements.txt"
  done_with requirements "$requirements"
fi

cd "$SOURCE"
package=$(find bgray pyproject.toml README.md LICENSE -type f ! -name '*.pyc' -print0 |
  sort -z | xargs -0 sha256sum | sha256sum)
if once package "$package"; then
  step "installing bgray" "$uv" pip install --python "$ENV/bin/python" \
    --no-deps --reinstall-package bgray "$SOURCE"
  done_with package "$package"
fi

if [[ " $* " = *" head "* && " $* " = *" aws "* ]]; then
  # Ray's AWS provider needs boto3; it is released in step with botocore, which is pinned.
  boto3=boto3==$(sed -n 's/^botocore==\([0-9.]*\).*/\1/p' requirements.txt)
  [ "$boto3" != boto3== ] || fail "requirements.txt does not pin botocore"
  if once aws "$boto3"; then
    step "installing $boto3" "$uv" pip install --python "$ENV/bin/python" "$boto3"
    done_with aws "$boto3"
  fi
fi

spill=$(spill_folder) || fail "no folder to spill objects to: neither /var/tmp nor an NVMe disk"
head=
# The head runs this twice, first as any node: what it said as a head stays.
if [[ " $* " = *" head "* ]] || grep -q JOB_STOP "$STATE/env" 2> /dev/null; then
  # A job that is asked to stop writes its checkpoints first; Ray's own patience is 3 s.
  head='export RAY_JOB_STOP_WAIT_TIME_S=120'
fi
aws=
if [[ " $* " = *" aws "* ]]; then
  # boto's own patience with the metadata service is one try of 1 s. A machine that is busy starting
  # Ray misses that, and then it says that there are no credentials.
  aws='export AWS_METADATA_SERVICE_TIMEOUT=10 AWS_METADATA_SERVICE_NUM_ATTEMPTS=5'
fi
cat > "$STATE/env.new" << END
export PATH="$ENV/bin:\$PATH"
export RAY_AUTH_MODE=token # nobody talks to this cluster without ~/.ray/auth_token
export BGRAY_SPILL=$spill
$head
$aws
END
mv "$STATE/env.new" "$STATE/env"

line='[ ! -f ~/.bgray/env ] || . ~/.bgray/env # bgray'
touch ~/.bashrc
if ! grep -qxF "$line" ~/.bashrc; then
  # At the top: Ubuntu's own returns early in shells that are not interactive. Kept in place (not
  # moved over), because it may be a link.
  { echo "$line" && cat ~/.bashrc; } > "$STATE/bashrc"
  cat "$STATE/bashrc" > ~/.bashrc
fi
