package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CRI says to a containerd what kubelet would say.
type CRI struct {
	Runtime runtimeapi.RuntimeServiceClient
	Image   runtimeapi.ImageServiceClient

	conn *grpc.ClientConn
	lab  *Lab
	log  string // containerd's
}

// dialCRI is called at each start; the connection is made once.
func (c *Containerd) dialCRI(ctx context.Context) error {
	if c.CRI != nil {
		return c.waitCRI(ctx)
	}
	cri, err := c.lab.newCRI(c.Address, c.Log)
	if err != nil {
		return err
	}
	c.CRI = cri
	return c.waitCRI(ctx)
}

// newCRI makes clients of the containerd at a socket, with that log.
func (l *Lab) newCRI(address, log string) (*CRI, error) {
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &CRI{Runtime: runtimeapi.NewRuntimeServiceClient(conn), Image: runtimeapi.NewImageServiceClient(conn), conn: conn, lab: l, log: log}, nil
}

// waitCRI waits until pods can be run.
func (c *Containerd) waitCRI(ctx context.Context) error {
	return WaitFor(ctx, "CRI", 60*time.Second, func() error {
		if err := c.Alive(); err != nil {
			return err
		}
		resp, err := c.CRI.Runtime.Status(ctx, &runtimeapi.StatusRequest{})
		if err != nil {
			return err
		}
		for _, x := range resp.Status.Conditions {
			if ready := x.Type == runtimeapi.RuntimeReady || x.Type == runtimeapi.NetworkReady; ready && !x.Status {
				return fmt.Errorf("%s is not so: %s: %s", x.Type, x.Reason, x.Message)
			}
		}
		return nil
	})
}

// failed adds what containerd says to an error of it.
func (c *CRI) failed(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w\ncontainerd's log ends:\n%s", what, err, Tail(c.log, 15))
}

// Pull pulls ref, with a credential if auth is not nil.
func (c *CRI) Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig) error {
	_, err := c.Image.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}, Auth: auth})
	return c.failed("pull "+ref, err)
}

// RemoveImage removes ref, as `crictl rmi` does.
func (c *CRI) RemoveImage(ctx context.Context, ref string) error {
	_, err := c.Image.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	return c.failed("remove "+ref, err)
}

// Images lists the references of the images that CRI knows.
func (c *CRI) Images(ctx context.Context) ([]string, error) {
	resp, err := c.Image.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	if err != nil {
		return nil, c.failed("list images", err)
	}
	var refs []string
	for _, im := range resp.Images {
		refs = append(refs, im.RepoTags...)
	}
	return refs, nil
}

// ImageID is the name that CRI gives an image that was pulled. kubelet uses it for the
// image volumes of pods.
func (c *CRI) ImageID(ctx context.Context, ref string) (string, error) {
	resp, err := c.Image.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err == nil && resp.Image == nil {
		err = errors.New("no such image")
	}
	if err != nil {
		return "", c.failed("status of image "+ref, err)
	}
	return resp.Image.Id, nil
}

// ImageFs is what kubelet is told of the file system that images are on.
func (c *CRI) ImageFs(ctx context.Context) (*runtimeapi.FilesystemUsage, error) {
	resp, err := c.Image.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err == nil && len(resp.ImageFilesystems) != 1 {
		err = fmt.Errorf("%d file systems, want 1", len(resp.ImageFilesystems))
	}
	if err != nil {
		return nil, c.failed("image file system", err)
	}
	return resp.ImageFilesystems[0], nil
}

// PodOptions say what is special about a pod.
type PodOptions struct {
	// Handler is the runtime handler (a RuntimeClass); empty: the default one.
	Handler string
	// HostIDs gives the pod a user namespace: ids from 0 on are those of the machine
	// from HostIDs on, 65536 of them. Such a pod has a network namespace of its own,
	// with nothing in it; others have the machine's. 0: no user namespace.
	HostIDs uint32
}

// Pod is a sandbox; its containers go with it.
type Pod struct {
	// ID is CRI's.
	ID string

	config *runtimeapi.PodSandboxConfig
	c      *CRI
}

// RunPod runs a sandbox.
func (c *CRI) RunPod(ctx context.Context, name string, o PodOptions) (*Pod, error) {
	p := &Pod{c: c, config: &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "lab", Uid: filepath.Base(c.lab.Dir) + name},
		LogDirectory: c.lab.Path("log"),
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    c.lab.cgroup(),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: o.namespaces()},
		},
	}}
	resp, err := c.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.config, RuntimeHandler: o.Handler})
	if err != nil {
		return nil, c.failed("run pod "+name, err)
	}
	p.ID = resp.PodSandboxId
	return p, nil
}

func (o PodOptions) namespaces() *runtimeapi.NamespaceOption {
	if o.HostIDs == 0 {
		return &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}
	}
	ids := []*runtimeapi.IDMapping{{HostId: o.HostIDs, ContainerId: 0, Length: 65536}}
	return &runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: ids, Gids: ids}}
}

// PodContainer is a container of a pod.
type PodContainer struct {
	// ID is CRI's.
	ID string

	c *CRI
}

// Start creates a container of ref in the pod, and starts it with a command.
func (p *Pod) Start(ctx context.Context, name, ref string, command ...string) (*PodContainer, error) {
	return p.StartConfig(ctx, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: ref},
		Command:  command,
	})
}

// StartConfig creates a container and starts it. What a pod decides for its
// containers is filled in.
func (p *Pod) StartConfig(ctx context.Context, config *runtimeapi.ContainerConfig) (*PodContainer, error) {
	name := config.Metadata.Name
	config.LogPath = p.config.Metadata.Name + "-" + name + ".log"
	config.Linux = &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
		NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions,
	}}
	created, err := p.c.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.ID, SandboxConfig: p.config, Config: config})
	if err != nil {
		return nil, p.c.failed("create container "+name, err)
	}
	_, err = p.c.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: created.ContainerId})
	return &PodContainer{created.ContainerId, p.c}, p.c.failed("start container "+name, err)
}

// Exec runs a command in the container to its end, and returns its standard output.
func (x *PodContainer) Exec(ctx context.Context, command ...string) (string, error) {
	resp, err := x.c.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: x.ID, Cmd: command})
	if err != nil {
		return "", x.c.failed("exec "+strings.Join(command, " "), err)
	}
	if resp.ExitCode != 0 {
		return string(resp.Stdout), fmt.Errorf("exec %s: exit status %d: %s", strings.Join(command, " "), resp.ExitCode, resp.Stderr)
	}
	return string(resp.Stdout), nil
}

// Wait waits until the container's process has ended, and returns its exit status.
func (x *PodContainer) Wait(ctx context.Context, timeout time.Duration) (status int32, err error) {
	err = WaitFor(ctx, "end of a container", timeout, func() error {
		resp, err := x.c.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: x.ID})
		if err != nil {
			return err
		}
		if resp.Status.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("it is in state %v", resp.Status.State)
		}
		status = resp.Status.ExitCode
		return nil
	})
	return status, err
}

// ImageVolume is an image that a container has as a read-only volume, or the directory
// sub of it.
func ImageVolume(at, image, sub string) *runtimeapi.Mount {
	return &runtimeapi.Mount{ContainerPath: at, Image: &runtimeapi.ImageSpec{Image: image}, ImageSubPath: sub, Readonly: true}
}

// Stop ends the pod's containers.
func (p *Pod) Stop(ctx context.Context) error {
	_, err := p.c.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.ID})
	return p.c.failed("stop pod", err)
}

// Remove ends the pod's containers and removes it.
func (p *Pod) Remove(ctx context.Context) error {
	if err := p.Stop(ctx); err != nil {
		return err
	}
	_, err := p.c.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.ID})
	return p.c.failed("remove pod", err)
}

// stopPods ends all pods, so that no process outlives the lab. It does not remove
// them, which a snapshotter that has been stopped before would be needed for.
func (c *CRI) stopPods() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	resp, err := c.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return c.failed("list pods", err)
	}
	var errs []error
	for _, p := range resp.Items {
		_, err := c.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.Id})
		errs = append(errs, c.failed("stop pod "+p.Metadata.Name, err))
	}
	return errors.Join(errs...)
}

// cgroup is what the lab's pods are below.
func (l *Lab) cgroup() string { return "/" + filepath.Base(l.Dir) }

// NewCgroup makes a cgroup of this name below the lab's, in all hierarchies, and returns
// what kubelet calls it. RemoveCgroup removes it.
func (l *Lab) NewCgroup(name string) (string, error) {
	hierarchies := []string{"/sys/fs/cgroup"}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil { // version 1
		var err error
		if hierarchies, err = filepath.Glob("/sys/fs/cgroup/*"); err != nil {
			return "", err
		}
	}
	for _, h := range hierarchies {
		above := h
		for _, elem := range []string{l.cgroup(), name} {
			dir := filepath.Join(above, elem)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return "", err
			}
			// A cpuset of version 1 has no processors at first, and nothing can be put into it.
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				b, err := os.ReadFile(filepath.Join(above, f))
				if err != nil || len(hierarchies) == 1 {
					continue // not this hierarchy
				}
				if err := os.WriteFile(filepath.Join(dir, f), b, 0); err != nil {
					return "", err
				}
			}
			above = dir
		}
	}
	return filepath.Join(l.cgroup(), name), nil
}

// RemoveCgroup removes what pods have left of the lab's cgroup. Processes that have just
// ended may be in it for a moment longer.
func (l *Lab) RemoveCgroup() error {
	return WaitFor(context.Background(), "removal of cgroup "+l.cgroup(), 20*time.Second, func() error {
		var errs []error
		for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup"} { // version 1, version 2
			dirs, err := filepath.Glob(pattern + l.cgroup())
			errs = append(errs, err)
			for _, d := range dirs {
				errs = append(errs, removeDirs(d))
			}
		}
		return errors.Join(errs...)
	})
}

// removeDirs removes a directory of a cgroup file system, whose files go with it.
func removeDirs(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() {
			errs = append(errs, removeDirs(filepath.Join(dir, e.Name())))
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
