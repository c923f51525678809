#!/bin/sh
# Serve another release of a node: `switch.sh RELEASE`, or `switch.sh --back RELEASE` to serve again what was served
# before that one. By systemd where this user has one, which then starts the node after a reboot, too; elsewhere as a
# plain process. A release is a folder beside the others, and `current` leads to the one that is served.
set -eu
cd "$(dirname "$0")/.."

if systemctl --user show-environment >/dev/null 2>&1; then
  unit=nonn-$(systemd-escape -- "${PWD#"$HOME"/}").service # a board may serve nodes of several folders
  loginctl enable-linger >/dev/null 2>&1 || true # the node goes on when nobody is logged in
  serve() {
    mkdir -p "$HOME/.config/systemd/user"
    cp current/node.service "$HOME/.config/systemd/user/$unit"
    systemctl --user daemon-reload
    systemctl --user enable --quiet "$unit"
    systemctl --user restart "$unit"
  }
  stop() { systemctl --user disable --quiet --now "$unit"; }
else
  boot_id=/proc/sys/kernel/random/boot_id
  # After a reboot the process of this number may be another one.
  [ ! -e boot ] || [ "$(cat boot)" = "$(cat "$boot_id")" ] || rm -f pid
  stop() { start-stop-daemon --stop --quiet --oknodo --retry TERM/5/KILL/5 --pidfile "$PWD/pid" --remove-pidfile; }
  serve() {
    stop
    cat "$boot_id" >boot
    start-stop-daemon --start --quiet --background --make-pidfile --pidfile "$PWD/pid" --startas /bin/sh -- \
      -c "exec '$PWD/current/node.sh' >>'$PWD/log' 2>&1 </dev/null"
  }
fi

lead() { ln -sfn "$1" current.new && mv -fT current.new current; }

if [ "$1" = --back ]; then
  [ "$(readlink current || true)" = "$2" ] || exit 0
  if [ -e "$2/former" ]; then
    lead "$(cat "$2/former")"
    serve
  else
    stop
    rm current
  fi
else
  former=$(readlink current || true)
  [ -z "$former" ] || [ "$former" = "$1" ] || echo "$former" >"$1/former"
  lead "$1"
  serve
  for release in */; do # what is served and what was before stay
    release=${release%/}
    case $release in "$1" | "$former" | current) ;; *) rm -rf "./$release" ;; esac
  done
fi
