# Written by shoal-kube. It removes shoal from this machine as soon as no container
# needs it. If this file goes, which a new installation does, then nothing is removed.
script={{quote .Script}}
while [ -e "$script" ]; do
	if {{quote .Shoal}}{{range .Args}} {{quote .}}{{end}}; then
		[ -e "$script" ] || exit 0
{{- if .Systemd}}
		systemctl disable {{.Node}} {{.Own}}
		systemctl stop {{.Node}}
{{- else if .Keep}}
		kill {{.Keep}}
		while [ -e /proc/{{.Keep}} ]; do sleep 0.1; done
{{- end}}
		mounts=
		while read -r _ _ _ _ at _; do
			case $at in {{quote .Root}}/*) mounts="$at $mounts" ;; esac
		done </proc/self/mountinfo
		for at in $mounts; do umount "$at"; done
		rm -rf{{range .Files}} {{quote .}}{{end}}
{{- if .Systemd}}
		systemctl daemon-reload
{{- end}}
		rm -f "$script"
		rmdir {{quote .Etc}} 2>/dev/null
		exit 0
	fi
	sleep 15
done
