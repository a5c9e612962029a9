package retire

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/kubernetes/typed/core/v1/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/shoalfs/shoal/cmd/shoal-kube/internal/watch"
)

var podLabels = map[string]string{"app.kubernetes.io/name": "shoal", "app.kubernetes.io/instance": "shoal", component: "node"}

const selector = "app.kubernetes.io/instance=shoal,app.kubernetes.io/component=node"

// cluster is an API with pods of the DaemonSet; pods that are made there end at once with
// the status for their machine, or run on if the status is -2. TestChart in
// integration/kubernetes uninstalls a real cluster.
func cluster(t *testing.T, statuses map[string]int32) (cfg Config, made *[]*corev1.Pod, most *int) {
	client := &fake.FakeCoreV1{Fake: &clienttesting.Fake{}}
	objects := clienttesting.NewObjectTracker(scheme.Scheme, scheme.Codecs.UniversalDecoder())
	made, most = new([]*corev1.Pod), new(int)
	running := 0
	client.AddReactor("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		p := a.(clienttesting.CreateAction).GetObject().(*corev1.Pod)
		if p.GenerateName != "" {
			p.Name = fmt.Sprintf("%s%d", p.GenerateName, len(*made))
			*made = append(*made, p.DeepCopy())
			running++
			*most = max(*most, running)
		}
		return false, nil, nil
	})
	client.AddReactor("list", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
		for _, p := range *made {
			code := statuses[p.Spec.NodeName]
			if code == -2 || p.Status.Phase != "" {
				continue
			}
			running--
			p.Status.Phase = corev1.PodSucceeded
			if code != 0 {
				p.Status.Phase = corev1.PodFailed
			}
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code, Message: "why " + p.Spec.NodeName + "\n"}}}}
			if err := objects.Update(corev1.SchemeGroupVersion.WithResource("pods"), p.DeepCopy(), "shoal-system"); err != nil {
				return true, nil, err
			}
		}
		return false, nil, nil
	})
	client.AddReactor("*", "*", clienttesting.ObjectReaction(objects))
	pods := client.Pods("shoal-system")
	for node := range statuses {
		_, err := pods.Create(t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "node-" + node, Namespace: "shoal-system", Labels: podLabels},
			Spec: corev1.PodSpec{
				NodeName: node, HostPID: true, Affinity: &corev1.Affinity{}, Priority: new(int32),
				InitContainers: []corev1.Container{{Name: Installer, Args: []string{"--bin-dir=/opt/bin"}}},
				Containers:     []corev1.Container{{Name: "watch"}},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	return Config{Pods: pods, Nodes: client.Nodes(), Selector: selector, Parallel: 2, Poll: time.Millisecond}, made, most
}

func (o outcome) String() string { return fmt.Sprint(o.code, o.message) }

// TestRun: each machine gets one pod, few at a time, and the report says how each ended.
func TestRun(t *testing.T) {
	cfg, made, most := cluster(t, map[string]int32{"a": 0, "b": InUse, "c": 0, "d": 1, "e": 0})
	var out strings.Builder
	cfg.Out = &out
	err := Run(t.Context(), cfg)
	if err == nil || err.Error() != "d: why d" {
		t.Errorf("error %v", err)
	}
	for _, want := range []string{"a: removed", "b: containerd does not use", "d: why d", "5 machines: 3 removed, 1 have containers that need shoal, 1 failed, 0 left"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
	if len(*made) != 5 || *most > 2 {
		t.Errorf("%d pods, %d at a time", len(*made), *most)
	}
	for _, p := range *made {
		if c := p.Spec.Containers; len(c) != 1 || len(p.Spec.InitContainers) > 0 || !slices.Equal(c[0].Args, []string{"--bin-dir=/opt/bin", Flag}) || !p.Spec.HostPID || p.Spec.Affinity != nil || p.Spec.Priority != nil || p.Labels[component] != role || p.Labels["app.kubernetes.io/instance"] != "shoal" {
			t.Errorf("%+v", p)
		}
	}
	list, err := cfg.Pods.List(t.Context(), mine)
	if err != nil || len(list.Items) > 0 {
		t.Errorf("%d pods are left, %v", len(list.Items), err)
	}
}

// TestLate: a machine that does not answer is named.
func TestLate(t *testing.T) {
	cfg, made, _ := cluster(t, map[string]int32{"a": 0, "gone": -2})
	var out strings.Builder
	cfg.Out = &out
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := Run(ctx, cfg); err == nil || !strings.Contains(err.Error(), "not uninstalled: gone") || len(*made) != 2 {
		t.Errorf("%v\n%s", err, &out)
	}
}

// TestNoPod: a machine that the DaemonSet does not select any more still has shoal, and the
// condition. It is uninstalled as the others are; without any pod, it is named.
func TestNoPod(t *testing.T) {
	narrow := func(cfg Config, pod string) {
		t.Helper()
		if err := cfg.Pods.Delete(t.Context(), pod, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		for name, condition := range map[string]corev1.NodeConditionType{"a": watch.Condition, "narrowed": watch.Condition, "without": corev1.NodeReady} {
			n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: condition}}}}
			if _, err := cfg.Nodes.Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	cfg, made, _ := cluster(t, map[string]int32{"a": 0, "narrowed": 1})
	narrow(cfg, "node-narrowed")
	var out strings.Builder
	cfg.Out = &out
	if err := Run(t.Context(), cfg); err == nil || err.Error() != "narrowed: why narrowed" || !strings.Contains(out.String(), "2 machines: 1 removed") {
		t.Errorf("%v\n%s", err, &out)
	}
	if len(*made) != 2 || (*made)[1].Spec.NodeName != "narrowed" {
		t.Errorf("%d pods\n%s", len(*made), &out)
	}

	cfg, made, _ = cluster(t, map[string]int32{"narrowed": 0})
	narrow(cfg, "node-narrowed")
	cfg.Out = &out
	if err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "not uninstalled: a, narrowed") || len(*made) > 0 {
		t.Errorf("%v, %d pods", err, len(*made))
	}
}

// TestOtherPods: if a pod cannot be taken back, nothing is done on its machine.
func TestOtherPods(t *testing.T) {
	cfg, made, _ := cluster(t, map[string]int32{"a": 0})
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "other", Namespace: "shoal-system", Labels: podLabels}, Spec: corev1.PodSpec{NodeName: "0"}}
	if _, err := cfg.Pods.Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	cfg.Out = &out
	if err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "pod other has no container install") || len(*made) > 0 {
		t.Errorf("%v, %d pods", err, len(*made))
	}
}

// TestNextRun: while a run ends, the next one may have begun. Each of them deletes its own
// pods only, and the next one works on a machine when the pod of the run before is gone.
func TestNextRun(t *testing.T) {
	cfg, made, _ := cluster(t, map[string]int32{"a": 0, "b": 0})
	other := func(name, node string) {
		t.Helper()
		p := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shoal-system", Labels: map[string]string{"app.kubernetes.io/name": "shoal", component: role}},
			Spec:       corev1.PodSpec{NodeName: node},
		}
		if _, err := cfg.Pods.Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	pods := &slowPods{PodInterface: cfg.Pods, slow: "before", lists: 5}
	pods.gone = func() {
		for _, p := range *made {
			if p.Spec.NodeName == "a" {
				t.Error("two pods are on a machine")
			}
		}
		other("after", "c")
	}
	other("before", "a")
	var out strings.Builder
	cfg.Pods, cfg.Out = pods, &out
	if err := Run(t.Context(), cfg); err != nil || !strings.Contains(out.String(), "2 machines: 2 removed") {
		t.Errorf("%v\n%s", err, &out)
	}
	list, err := cfg.Pods.List(t.Context(), mine)
	if err != nil || len(list.Items) != 1 || list.Items[0].Name != "after" {
		t.Errorf("left: %v, %v", list.Items, err)
	}
}

// slowPods are pods of which one takes some lists until it is gone after its deletion.
type slowPods struct {
	typedcorev1.PodInterface

	slow    string
	deleted bool
	lists   int
	gone    func()
}

func (s *slowPods) Delete(ctx context.Context, name string, o metav1.DeleteOptions) error {
	if name == s.slow {
		s.deleted = true
		return nil
	}
	return s.PodInterface.Delete(ctx, name, o)
}

func (s *slowPods) List(ctx context.Context, o metav1.ListOptions) (*corev1.PodList, error) {
	if s.deleted {
		if s.lists--; s.lists == 0 {
			if err := s.PodInterface.Delete(ctx, s.slow, metav1.DeleteOptions{}); err != nil {
				return nil, err
			}
			s.gone()
		}
	}
	return s.PodInterface.List(ctx, o)
}
