package watch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/shoalfs/shoal/internal/control"
)

// api is an API server. The suite runs on client-go's fake and on a real one.
type api struct {
	// admin may do everything, program what Rules say.
	admin, program typedcorev1.CoreV1Interface
	// forget may do what ForgetRules say.
	forget typedcorev1.CoreV1Interface
	// writes counts the requests of program that write nodes.
	writes func() int64
}

// suite is what Watch does to an API server, each test with a node of its own.
func suite(t *testing.T, a api) {
	for name, test := range map[string]func(*testing.T, api){
		"Condition": testCondition, "Grace": testGrace, "Restart": testRestart, "Taint": testTaint, "NoTaint": testNoTaint,
		"Events": testEvents, "Repeated": testRepeated, "Clear": testClear, "Forget": testForget,
	} {
		t.Run(name, func(t *testing.T) { test(t, a) })
	}
}

// shoal is a node of which a test says how it does.
type shoal struct {
	mu    sync.Mutex
	st    control.State
	err   error
	asked atomic.Int64
}

func newShoal() *shoal {
	return &shoal{st: control.State{Version: "v1", Last: 1000}}
}

// up is that it serves, as change says; nil: all is well.
func (s *shoal) up(change func(*control.State)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = nil
	s.st.NoSupernode, s.st.Called = "", time.Now()
	if change != nil {
		change(&s.st)
	}
}

func (s *shoal) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

// notice adds one.
func (s *shoal) notice(n control.Notice) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.st.Last++
	n.Number, n.At = s.st.Last, time.Now()
	s.st.Notices = append(s.st.Notices, n)
}

func (s *shoal) State(_ context.Context, after uint64) (*control.State, error) {
	s.asked.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, s.err
	}
	st := s.st
	st.Notices = slices.DeleteFunc(slices.Clone(st.Notices), func(n control.Notice) bool { return n.Number <= after })
	return &st, nil
}

// asks waits until the node has been asked some times more.
func (s *shoal) asks(t *testing.T) {
	t.Helper()
	want := s.asked.Load() + 5
	waitFor(t, "the node is asked", func() error {
		if s.asked.Load() < want {
			return errors.New("it is not")
		}
		return nil
	})
}

func waitFor(t *testing.T, what string, ok func() error) {
	t.Helper()
	end := time.Now().Add(2 * time.Minute)
	for {
		err := ok()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond) // the pace of a poll with an end
	}
}

// newNode makes a Kubernetes node with a condition and a taint of others.
func newNode(t *testing.T, a api) string {
	t.Helper()
	name := "node-" + strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-"))
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.NodeSpec{Taints: []corev1.Taint{{Key: "example.org/mine", Effect: corev1.TaintEffectNoExecute}}},
	}
	n, err := a.admin.Nodes().Create(t.Context(), n, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady"}}
	if _, err := a.admin.Nodes().UpdateStatus(t.Context(), n, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.admin.Nodes().Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	return name
}

// run watches until the test ends or stop is called.
func run(t *testing.T, a api, node string, s Shoal, change func(*Config)) (stop func()) {
	t.Helper()
	cfg := Defaults()
	cfg.Client, cfg.Shoal, cfg.Node, cfg.Log = a.program, s, node, slog.New(slog.NewTextHandler(t.Output(), nil))
	cfg.Poll, cfg.Grace, cfg.Heartbeat, cfg.TaintAfter = time.Millisecond, 0, time.Hour, 0
	if change != nil {
		change(&cfg)
	}
	w, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func get(t *testing.T, a api, node string) *corev1.Node {
	t.Helper()
	n, err := a.admin.Nodes().Get(context.Background(), node, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == corev1.NodeReady && c.Reason == "KubeletReady" }) {
		t.Errorf("kubelet's condition is gone: %+v", n.Status.Conditions)
	}
	if !slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool {
		return t.Key == "example.org/mine" && t.Effect == corev1.TaintEffectNoExecute
	}) {
		t.Errorf("the taint of others is gone: %+v", n.Spec.Taints)
	}
	return n
}

// says waits until the condition has a status and a reason.
func says(t *testing.T, a api, node string, status corev1.ConditionStatus, reason string) corev1.NodeCondition {
	t.Helper()
	var c *corev1.NodeCondition
	waitFor(t, "the condition", func() error {
		if c = find(get(t, a, node)); c == nil || c.Status != status || c.Reason != reason {
			return fmt.Errorf("it is %+v, want %s, %s", c, status, reason)
		}
		return nil
	})
	return *c
}

func tainted(t *testing.T, a api, node string) bool {
	t.Helper()
	return slices.ContainsFunc(get(t, a, node).Spec.Taints, func(t corev1.Taint) bool { return t.Key == TaintKey })
}

func waitTaint(t *testing.T, a api, node string, want bool) {
	t.Helper()
	waitFor(t, "the taint", func() error {
		if got := tainted(t, a, node); got != want {
			return fmt.Errorf("it is there: %v, want %v", got, want)
		}
		return nil
	})
}

// errDown is what the client returns if no process serves the socket.
var errDown = fmt.Errorf("%w at /run/shoal/control.sock", control.ErrNoDaemon)

// testCondition: the condition says what is so, at once, and nothing is written if nothing
// has changed.
func testCondition(t *testing.T, a api) {
	node, s := newNode(t, a), newShoal()
	s.up(nil)
	before := a.writes()
	run(t, a, node, s, nil)
	c := says(t, a, node, corev1.ConditionTrue, ReasonReady)
	if !strings.Contains(c.Message, "v1") || c.LastHeartbeatTime.IsZero() || c.LastTransitionTime.IsZero() {
		t.Errorf("%+v", c)
	}
	s.asks(t)
	if n := a.writes() - before; n != 1 {
		t.Errorf("%d writes for one change", n)
	}
	// The time of a transition stays while the status does.
	s.up(func(st *control.State) { st.NoSupernode = "no supernode has let this node in" })
	c = says(t, a, node, corev1.ConditionFalse, ReasonNoSupernode)
	if !strings.Contains(c.Message, "has let this node in") {
		t.Errorf("%+v", c)
	}
	s.fail(errDown)
	if d := says(t, a, node, corev1.ConditionFalse, ReasonNodeDown); !d.LastTransitionTime.Equal(&c.LastTransitionTime) {
		t.Errorf("transition at %v, then at %v", c.LastTransitionTime, d.LastTransitionTime)
	}
	s.up(nil)
	says(t, a, node, corev1.ConditionTrue, ReasonReady)
	// The fifth change; the sixth within a minute waits.
	s.fail(control.ErrSilent)
	says(t, a, node, corev1.ConditionFalse, ReasonNodeSilent)
	s.up(nil)
	s.asks(t)
	if n := a.writes() - before; n != 5 {
		t.Errorf("%d writes in the first moments", n)
	}
}

// testGrace: a node that is away for less than the grace has not been away.
func testGrace(t *testing.T, a api) {
	node, s := newNode(t, a), newShoal()
	s.up(nil)
	run(t, a, node, s, func(c *Config) { c.Grace, c.Taint, c.TaintAfter = time.Hour, true, time.Hour })
	says(t, a, node, corev1.ConditionTrue, ReasonReady)
	before := a.writes()
	for range 5 {
		s.fail(errDown)
		s.asks(t)
		s.up(nil)
		s.asks(t)
	}
	if n := a.writes() - before; n != 0 || tainted(t, a, node) {
		t.Errorf("%d writes, tainted: %v", n, tainted(t, a, node))
	}
	says(t, a, node, corev1.ConditionTrue, ReasonReady)
}

// testRestart: what an earlier process has written stays, until there is something to say.
func testRestart(t *testing.T, a api) {
	node, s := newNode(t, a), newShoal()
	s.up(nil)
	stop := run(t, a, node, s, nil)
	c := says(t, a, node, corev1.ConditionTrue, ReasonReady)
	stop()
	s.fail(errDown)
	stop = run(t, a, node, s, func(c *Config) { c.Grace = time.Hour })
	s.asks(t)
	if d := says(t, a, node, corev1.ConditionTrue, ReasonReady); d.LastHeartbeatTime != c.LastHeartbeatTime {
		t.Errorf("%+v, want %+v", d, c)
	}
	stop()
	s.up(nil)
	before := a.writes()
	run(t, a, node, s, nil)
	waitFor(t, "a write", func() error {
		if a.writes() == before {
			return errors.New("none")
		}
		return nil
	})
	if d := says(t, a, node, corev1.ConditionTrue, ReasonReady); !d.LastTransitionTime.Equal(&c.LastTransitionTime) {
		t.Errorf("transition at %v, and before the restart at %v", d.LastTransitionTime, c.LastTransitionTime)
	}
}

// testTaint: pods are kept off while they cannot start, and only then.
func testTaint(t *testing.T, a api) {
	node, s := newNode(t, a), newShoal()
	s.fail(errDown)
	run(t, a, node, s, func(c *Config) { c.Taint = true })
	waitTaint(t, a, node, true)
	s.up(nil)
	waitTaint(t, a, node, false)
	// Without a supernode pods start.
	s.up(func(st *control.State) { st.NoSupernode = "it is away" })
	says(t, a, node, corev1.ConditionFalse, ReasonNoSupernode)
	s.asks(t)
	if tainted(t, a, node) {
		t.Error("tainted, and only the supernode is away")
	}
	s.fail(control.ErrSilent)
	waitTaint(t, a, node, true)
	s.up(func(st *control.State) { st.Called = time.Time{} })
	waitTaint(t, a, node, false)
}

// testNoTaint: without the option no taint is touched.
func testNoTaint(t *testing.T, a api) {
	node, s := newNode(t, a), newShoal()
	s.fail(errDown)
	run(t, a, node, s, nil)
	says(t, a, node, corev1.ConditionFalse, ReasonNodeDown)
	s.asks(t)
	if tainted(t, a, node) {
		t.Error("tainted without --taint")
	}
}

// newPod makes a pod on a node, with these images.
func newPod(t *testing.T, a api, name, node string, images ...string) {
	t.Helper()
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", UID: "uid-" + "1"}, Spec: corev1.PodSpec{NodeName: node}}
	for i, image := range images {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: fmt.Sprintf("c%d", i), Image: image})
	}
	if _, err := a.admin.Pods("default").Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		grace := int64(0)
		if err := a.admin.Pods("default").Delete(context.Background(), name, metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil {
			t.Error(err)
		}
	})
}

// eventsOf returns reason, type and container of a pod's events, and how often each was.
func eventsOf(t *testing.T, a api, pod string) map[string]int32 {
	t.Helper()
	list, err := a.admin.Events("default").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]int32{}
	for _, e := range list.Items {
		if e.InvolvedObject.Name != pod {
			continue
		}
		if e.Source.Component != Component || e.Source.Host == "" || e.InvolvedObject.UID == "" || e.Message == "" {
			t.Errorf("event: %+v", e)
		}
		found[fmt.Sprint(e.Reason, " ", e.Type, " ", e.InvolvedObject.FieldPath)] += e.Count
	}
	return found
}

// testEvents: pods of this node get the events of their images, others none.
func testEvents(t *testing.T, a api) {
	node, s := newNode(t, a), newShoal()
	newPod(t, a, "app", node, "redis:7", "example.org/app:v1@sha256:"+strings.Repeat("ab", 32))
	newPod(t, a, "other", node, "example.org/other:v1")
	newPod(t, a, "elsewhere", "another-node", "redis:7")
	s.up(nil)
	const redis = "docker.io/library/redis:7"
	app := "example.org/app@sha256:" + strings.Repeat("ab", 32)
	s.notice(control.Notice{What: control.Lazy, Refs: []string{redis}})
	s.notice(control.Notice{What: control.Unpacked, Refs: []string{app}, Cause: "slow", Why: "100% of the time\nsecond line"})
	s.notice(control.Notice{What: "of a newer version", Refs: []string{redis}})
	run(t, a, node, s, nil)
	want := map[string]int32{"ImageLazy Normal spec.containers{c0}": 1, "ImageNotLazy Warning spec.containers{c1}": 1}
	has := func(pod string, want map[string]int32) {
		t.Helper()
		waitFor(t, "the events of "+pod, func() error {
			got := eventsOf(t, a, pod)
			for k, n := range want {
				if got[k] != n {
					return fmt.Errorf("got %v, want %v", got, want)
				}
			}
			if len(got) != len(want) {
				return fmt.Errorf("got %v, want %v", got, want)
			}
			return nil
		})
	}
	has("app", want)
	s.notice(control.Notice{What: control.Unpacked, Refs: []string{"example.org/other:v1"}, Cause: "config", Why: "images.never"})
	s.notice(control.Notice{What: control.Quarantined, Refs: []string{"nobody/uses:it", redis}, Layer: "sha256:cd", Why: "other bytes"})
	s.notice(control.Notice{What: control.ReadFailed, Refs: []string{redis}, Layer: "sha256:cd", Why: "no source"})
	has("other", map[string]int32{"ImageNotLazy Normal spec.containers{c0}": 1})
	want["ImageQuarantined Warning spec.containers{c0}"], want["ImageReadFailed Warning spec.containers{c0}"] = 1, 1
	has("app", want)
	has("elsewhere", nil)
}

// testRepeated: what happens again and again is one event that is counted, and is not told
// again by the next process.
func testRepeated(t *testing.T, a api) {
	node, s := newNode(t, a), newShoal()
	newPod(t, a, "reader", node, "example.org/reader:v1")
	s.up(nil)
	n := control.Notice{What: control.ReadFailed, Refs: []string{"example.org/reader:v1"}, Layer: "sha256:cd", Why: "no source"}
	for range 3 {
		s.notice(n)
	}
	stop := run(t, a, node, s, nil)
	const event = "ImageReadFailed Warning spec.containers{c0}"
	counted := func(want int32) {
		t.Helper()
		waitFor(t, "the event", func() error {
			if got := eventsOf(t, a, "reader"); got[event] != want {
				return fmt.Errorf("got %v, want %d of %s", got, want, event)
			}
			return nil
		})
	}
	counted(3)
	list, err := a.admin.Events("default").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	list.Items = slices.DeleteFunc(list.Items, func(e corev1.Event) bool { return e.InvolvedObject.Name != "reader" })
	if len(list.Items) != 1 {
		t.Errorf("%d objects for one event: %+v", len(list.Items), list.Items)
	}
	stop()
	s.mu.Lock()
	for i := range s.st.Notices {
		s.st.Notices[i].At = time.Now().Add(-2 * fresh)
	}
	s.mu.Unlock()
	run(t, a, node, s, nil)
	says(t, a, node, corev1.ConditionTrue, ReasonReady)
	s.asks(t)
	counted(3)
}

// testClear: nothing of shoal is left, and all of others.
func testClear(t *testing.T, a api) {
	node, s := newNode(t, a), newShoal()
	if err := Clear(t.Context(), a.program, node); err != nil {
		t.Errorf("clear a node that has nothing: %v", err)
	}
	s.fail(errDown)
	stop := run(t, a, node, s, func(c *Config) { c.Taint = true })
	says(t, a, node, corev1.ConditionFalse, ReasonNodeDown)
	waitTaint(t, a, node, true)
	stop()
	if err := Clear(t.Context(), a.program, node); err != nil {
		t.Fatal(err)
	}
	if c := find(get(t, a, node)); c != nil || tainted(t, a, node) {
		t.Errorf("left: %+v, taint: %v", c, tainted(t, a, node))
	}
	if err := Clear(t.Context(), a.program, node+"-not-there"); err == nil {
		t.Error("a node that does not exist was cleared")
	}
}

// testForget: when the pods that watch are gone, no node has condition or taint.
func testForget(t *testing.T, a api) {
	node, s := newNode(t, a), newShoal()
	pods := a.admin.Pods("default")
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "watch", Namespace: "default", Labels: map[string]string{"app": "watch"}},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "watch", Image: "shoal"}}},
	}
	if _, err := pods.Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.fail(errDown)
	stop := run(t, a, node, s, func(c *Config) { c.Taint = true })
	says(t, a, node, corev1.ConditionFalse, ReasonNodeDown)
	waitTaint(t, a, node, true)
	stop()

	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if n, err := Forget(ctx, a.forget, "default", "app=watch", time.Millisecond); n != 0 || err == nil || find(get(t, a, node)) == nil {
		t.Errorf("%d nodes forgotten while a pod watches: %v", n, err)
	}
	grace := int64(0)
	if err := pods.Delete(t.Context(), p.Name, metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil {
		t.Fatal(err)
	}
	if n, err := Forget(t.Context(), a.forget, "default", "app=watch", time.Millisecond); n != 1 || err != nil {
		t.Errorf("%d nodes forgotten: %v", n, err)
	}
	if c := find(get(t, a, node)); c != nil || tainted(t, a, node) {
		t.Errorf("left: %+v, taint: %v", c, tainted(t, a, node))
	}
	if n, err := Forget(t.Context(), a.forget, "default", "app=watch", time.Millisecond); n != 0 || err != nil {
		t.Errorf("%d nodes forgotten again: %v", n, err)
	}
}

// freePort returns a port of loopback that is free now.
func freePort(t *testing.T) int {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port
}
