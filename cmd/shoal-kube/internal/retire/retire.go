// Package retire takes shoal off the machines of a cluster: on each machine, a pod takes back
// what the pod of the DaemonSet has done there.
//
// # Invariants
//
//   - A machine that has shoal is uninstalled or named in the error, also if its pod is gone,
//     because the DaemonSet does not select it any more: the condition of its Kubernetes node
//     is still there.
//   - Two pods never work on a machine at the same time: a run ends the pods of the run
//     before it, and waits on each machine until its pod is gone.
//   - At its end a run deletes its own pods and no others: the next run may have begun.
package retire

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/shoalfs/shoal/cmd/shoal-kube/internal/watch"
)

// InUse is the exit status of a pod that has left a node for the containers that need it.
const InUse = 3

// Config of Run; all of it is required.
type Config struct {
	// Pods are those of the namespace.
	Pods typedcorev1.PodInterface
	// Nodes are those of the cluster.
	Nodes typedcorev1.NodeInterface
	// Selector selects the pods that installed shoal.
	Selector string
	// Parallel is how many machines are uninstalled at a time.
	Parallel int
	// Poll is how often pods are looked at.
	Poll time.Duration
	// Out gets a line for each machine.
	Out io.Writer
}

const (
	component = "app.kubernetes.io/component"
	role      = "uninstall"
	// Installer is the container that has installed shoal; Flag, as an argument of it, has
	// it do the opposite.
	Installer, Flag = "install", "--uninstall"
	prefix          = "shoal-uninstall-"
)

// outcome is that of a machine.
type outcome struct {
	done    bool
	code    int32
	message string
}

// Run uninstalls all machines, and says so of each one. The error names those that are
// left when ctx ends, or that failed.
func Run(ctx context.Context, cfg Config) error {
	list, err := cfg.Pods.List(ctx, metav1.ListOptions{LabelSelector: cfg.Selector})
	if err != nil {
		return err
	}
	left := map[string]*corev1.Pod{}
	var one *corev1.Pod
	for _, p := range list.Items {
		if p.Spec.NodeName != "" {
			left[p.Spec.NodeName], one = &p, &p
		}
	}
	watched, err := watch.Watched(ctx, cfg.Nodes)
	if err != nil {
		return err
	}
	for _, node := range watched {
		if left[node] == nil {
			fmt.Fprintf(cfg.Out, "%s: it has the condition %s, and no pod of the DaemonSet\n", node, watch.Condition)
			left[node] = one // all pods are of the same template
		}
	}
	if one == nil && len(left) > 0 {
		return fmt.Errorf("not uninstalled: %s: the DaemonSet has no pod that shows how they were installed; set node.nodeSelector to what selects one of them, and try again",
			strings.Join(slices.Sorted(maps.Keys(left)), ", "))
	}
	all := len(left)
	r := run{Config: cfg, running: map[string]string{}}
	inUse, failed := []string(nil), map[string]string{}
	err = r.endOthers(ctx)
	for len(left) > 0 && err == nil {
		var done map[string]outcome
		if done, err = r.next(ctx, left); err != nil {
			break
		}
		for _, node := range slices.Sorted(maps.Keys(done)) {
			delete(left, node)
			switch o := done[node]; o.code {
			case 0:
				fmt.Fprintf(cfg.Out, "%s: removed\n", node)
			case InUse:
				inUse = append(inUse, node)
				fmt.Fprintf(cfg.Out, "%s: containerd does not use shoal any more; shoal goes when the containers that need it have ended\n", node)
			default:
				failed[node] = o.message
				fmt.Fprintf(cfg.Out, "%s: %s\n", node, o.message)
			}
		}
	}
	err = errors.Join(err, r.remove(context.WithoutCancel(ctx), r.made))
	fmt.Fprintf(cfg.Out, "%d machines: %d removed, %d have containers that need shoal, %d failed, %d left\n",
		all, all-len(inUse)-len(failed)-len(left), len(inUse), len(failed), len(left))
	for _, node := range slices.Sorted(maps.Keys(failed)) {
		err = errors.Join(err, fmt.Errorf("%s: %s", node, failed[node]))
	}
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("not uninstalled: %s", strings.Join(slices.Sorted(maps.Keys(left)), ", ")))
	}
	return err
}

type run struct {
	Config

	running map[string]string // pods by machine
	made    []string          // all pods of this run
}

// start starts the pod of a machine.
func (r *run) start(ctx context.Context, node string, installed *corev1.Pod) error {
	p, err := opposite(installed, node)
	if err != nil {
		return err
	}
	p, err = r.Pods.Create(ctx, p, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("a pod on %s: %w", node, err)
	}
	r.running[node] = p.Name
	r.made = append(r.made, p.Name)
	return nil
}

// opposite is the pod that takes back on a machine what this one has done, there or on
// another machine.
func opposite(installed *corev1.Pod, node string) (*corev1.Pod, error) {
	spec := installed.Spec.DeepCopy()
	i := slices.IndexFunc(spec.InitContainers, func(c corev1.Container) bool { return c.Name == Installer })
	if i < 0 {
		return nil, fmt.Errorf("pod %s has no container %s", installed.Name, Installer)
	}
	c := spec.InitContainers[i]
	c.Name = role
	c.Args = append(c.Args, Flag)
	spec.InitContainers, spec.Containers = nil, []corev1.Container{c}
	// What was decided of the other pod.
	spec.NodeSelector, spec.Affinity, spec.Priority = nil, nil, nil
	spec.NodeName = node
	spec.RestartPolicy = corev1.RestartPolicyNever
	own := labels.Set{component: role} // so that it is not the DaemonSet's
	for _, key := range kept {
		own[key] = installed.Labels[key]
	}
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: prefix, Labels: own}, Spec: *spec}, nil
}

// kept are the labels that tell the chart's objects from others.
var kept = []string{"app.kubernetes.io/name", "app.kubernetes.io/instance"}

// next starts pods on machines that are left until there are enough, waits until pods have
// ended, and returns their outcomes by machine.
func (r *run) next(ctx context.Context, left map[string]*corev1.Pod) (map[string]outcome, error) {
	for {
		list, err := r.Pods.List(ctx, mine)
		if err != nil {
			return nil, err
		}
		done, others := map[string]outcome{}, map[string]bool{}
		for _, p := range list.Items {
			switch node := p.Spec.NodeName; {
			case r.running[node] != p.Name:
				others[node] = true
			default:
				if o := ended(&p); o.done {
					done[node] = o
					delete(r.running, node)
				}
			}
		}
		if len(done) > 0 {
			return done, nil
		}
		for _, node := range slices.Sorted(maps.Keys(left)) {
			if len(r.running) < r.Parallel && r.running[node] == "" && !others[node] {
				if err := r.start(ctx, node, left[node]); err != nil {
					return nil, err
				}
			}
		}
		select {
		case <-time.After(r.Poll):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func ended(p *corev1.Pod) outcome {
	if p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed {
		return outcome{}
	}
	o := outcome{done: true, code: -1, message: p.Status.Message}
	if p.Status.Phase == corev1.PodSucceeded {
		o.code = 0
	}
	for _, c := range p.Status.ContainerStatuses {
		if t := c.State.Terminated; t != nil {
			o.code, o.message = t.ExitCode, strings.TrimSpace(t.Message)
		}
	}
	return o
}

// mine selects the pods that start makes, in this run and in others.
var mine = metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=shoal," + component + "=" + role}

// endOthers ends the pods of other runs, which cannot go on: Helm starts a Job only after it
// has deleted the one before.
func (r *run) endOthers(ctx context.Context) error {
	list, err := r.Pods.List(ctx, mine)
	if err != nil {
		return err
	}
	var names []string
	for _, p := range list.Items {
		names = append(names, p.Name)
	}
	return r.remove(ctx, names)
}

// remove deletes pods.
func (r *run) remove(ctx context.Context, names []string) error {
	var errs []error
	for _, name := range names {
		if err := r.Pods.Delete(ctx, name, metav1.DeleteOptions{}); !apierrors.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
