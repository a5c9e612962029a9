// Package lab sets up what the integration tests, the benchmarks and the demo
// run against: a real registry, a real containerd with runc, real shoal
// processes, and links between them with a rate and a delay.
//
// Everything listens on loopback and lives below one directory. Close undoes it
// all, in reverse order: processes are stopped by the pid that was started,
// mounts below the directory are unmounted, the directory is removed.
//
// # CRI
//
// With ContainerdOptions.CRI containerd's CRI plugins are on, and Containerd.CRI
// says to it what kubelet would say: pull (with or without a credential), run a
// pod, start a container in it, exec, list and remove images, ask for the image
// file system. Its fields Runtime and Image are the gRPC clients, for all else.
//
//	pause, _ := registry.PushPause(ctx)
//	c, _ := l.StartContainerd(ctx, "ctrd", lab.ContainerdOptions{
//		Shoal: node.Socket, ShoalRoot: node.Root, CRI: &lab.CRIOptions{Pause: pause},
//	})
//	_ = c.CRI.Pull(ctx, ref, nil)
//	pod, _ := c.CRI.RunPod(ctx, "pod", lab.PodOptions{})
//	x, _ := pod.Start(ctx, "main", ref, "/guest", "pause")
//	out, _ := x.Exec(ctx, "/guest", "cat", "/data")
//	_ = pod.Remove(ctx)
//
// Pods have the machine's network; those with a user namespace (PodOptions.HostIDs)
// have an empty one of their own, and need runc >= 1.2, which `make setup` builds
// and containerd 2.x uses here. Containers need a program in their image:
// Lab.Guest is a layer with one. Lab.ContainerdVersions lists the versions to test
// with; Containerd.Restart, after Stop, Kill or Reconfigure, starts it again while
// pods run on. Close stops the pods.
//
// Needs root, and the programs that `make setup` installs (Debian's
// docker-registry, containerd 1.6 and runc) or builds (containerd 2.x, runc, guest).
package lab
