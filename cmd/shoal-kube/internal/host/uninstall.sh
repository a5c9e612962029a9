# Written by shoal-kube. It removes shoal from this machine as soon as no container
# needs it. If this file goes, which a new installation does, then nothing is removed.
set -f
script={{quote .Script}}
failed={{quote .Failed}}
rm -f "$failed"

# fail ends the script, with everything below the node's directory as it is. shoal-kube
# reads the file.
fail() {
	echo "shoal is not removed from this machine: $*" | tee "$failed" >&2
	exit 1
}

# mounts calls $1 with the type and the path of each mount that the node has made below its
# directory, the last one first. It does not look into them.
mounts() {
	list=
	while read -r _ _ _ _ at rest; do
		case $at in {{quote .Mounted}}/fuse{{range .Names}} | {{quote $.Mounted}}/{{.}}/*{{end}}) ;; *) continue ;; esac
		case $rest in *"- fuse"*) type=fuse ;; *) type=other ;; esac
		list="$type $at $list"
	done </proc/self/mountinfo
	what=$1
	set -- $list
	while [ $# -gt 0 ]; do
		"$what" "$1" {{quote .Root}}"${2#{{quote .Mounted}}}"
		shift 2
	done
}

# unmount takes one mount away. umount looks at the mount before that, and at the file
# that the mount is made from. If no process serves the FUSE mount and one still holds its
# connection, then such a look waits without end. Only layers' mounts use the FUSE mount,
# so it may be detached at once.
unmount() {
	case $1 in
	fuse) timeout -s KILL {{.Limit}} umount -l "$2" ;;
	*) timeout -s KILL {{.Limit}} umount "$2" ;;
	esac
}

name() { left="$left $2"; }

while [ -e "$script" ]; do
	if {{quote .Shoal}}{{range .Args}} {{quote .}}{{end}}; then
		[ -e "$script" ] || exit 0
{{- if .Systemd}}
		systemctl disable {{.Node}}
		systemctl stop {{.Node}}
		! systemctl is-active --quiet {{.Node}} || fail "{{.Node}} does not stop. Stop it, then run: systemctl restart {{.Own}}"
		# systemd 254 and later go on holding the FUSE connection; earlier ones know no such store.
		systemctl clean --what=fdstore {{.Node}} 2>/dev/null
{{- else if .Keep}}
		keeps() { grep -qs keep /proc/{{.Keep}}/cmdline; }
		! keeps || kill {{.Keep}}
		tenths=0
		while keeps; do
			[ $tenths -lt {{.Tenths}} ] || fail "shoal keep (process {{.Keep}}) does not end. End it, then run: sh $script"
			tenths=$((tenths + 1))
			sleep 0.1
		done
{{- end}}
		! timeout {{.Limit}} {{quote .Shoal}} status --control {{quote .Control}} >/dev/null 2>&1 || fail "a node still runs, and not by {{if .Systemd}}{{.Node}}{{else}}the process that ran it{{end}}. Stop it, then run: {{if .Systemd}}systemctl restart {{.Own}}{{else}}sh $script{{end}}"
		mounts unmount
		left=
		mounts name
		[ -z "$left" ] || fail "processes still use what is mounted at$left. Nothing below "{{quote .Root}}" was deleted. End these processes (fuser -vm shows the processes of a mount), then run: {{if .Systemd}}systemctl restart {{.Own}}{{else}}sh $script{{end}}"
		# If this is interrupted, then it can be done again: what that needs goes last. Files
		# of others may be below the node's directory.
		if [ -d {{quote .Root}} ]; then
			(set +f; cd {{quote .Root}} && rm -rf{{range .Names}} {{.}} {{.}}.damaged* .{{.}}-*{{end}})
			rmdir {{quote .Root}} || echo "what is left below "{{quote .Root}}" is not shoal's, and stays" >&2
		fi
		[ -e {{quote .Link}} ] || rm -f {{quote .Link}}
		rm -f{{range .Files}} {{quote .}}{{end}}
{{- if .Systemd}}
		systemctl disable {{.Own}}
{{- end}}
		rm -f{{range .Last}} {{quote .}}{{end}} "$script"
{{- if .Systemd}}
		systemctl daemon-reload
{{- end}}
		{{if .Dirs}}rmdir{{range .Dirs}} {{quote .}}{{end}} 2>/dev/null{{end}}
		exit 0
	fi
	sleep 15
done
