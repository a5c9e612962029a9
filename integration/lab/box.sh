# The first process of a box: LAB IMAGE DIR UP. It is in mount and pid namespaces of
# its own, with private mounts, and lives as long as its standard input is open.
set -e
lab=$1 image=$2 dir=$3 up=$4

# Mounts of others would be held by being here.
awk -v lab="$lab/" '$5 ~ "^/(tmp|mnt|run|dev/shm)/" && index(lab, $5 "/") != 1 {print $5}' /proc/self/mountinfo |
	tac | while read -r m; do umount -l "$m" 2>/dev/null || true; done
# containerd, kubelet and shoal see each other's mounts.
mount --make-rshared /
mount -t proc proc /proc

mount -o loop,discard "$image" "$dir"
for d in etc opt usr/local var; do
	mkdir -p "$dir/$d" "$dir/.work/$d"
	mount -t overlay overlay -o "lowerdir=/$d,upperdir=$dir/$d,workdir=$dir/.work/$d" "/$d"
done
# What containers write to is no overlay on an overlay.
mkdir -p "$dir/lib" "$dir/log"
mount --bind "$dir/lib" /var/lib
mount --bind "$dir/log" /var/log
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/lock
ip link set lo up

touch "$up"
# What loses its parent is reaped at once where its new parent ignores that it ended.
exec env --ignore-signal=CHLD cat >/dev/null
