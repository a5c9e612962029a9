package watch

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/shoalfs/shoal/internal/control"
)

func TestJudge(t *testing.T) {
	now := time.Unix(10000, 0)
	calls := now.Add(-10 * time.Second)
	var all []string
	for _, c := range []struct {
		st     control.State
		err    error
		status corev1.ConditionStatus
		reason string
		starts bool
	}{
		{control.State{Called: calls}, nil, corev1.ConditionTrue, ReasonReady, true},
		{control.State{Called: calls, NoSupernode: strings.Repeat("x", 2*maxMessage)}, nil, corev1.ConditionFalse, ReasonNoSupernode, true},
		{control.State{}, nil, corev1.ConditionFalse, ReasonContainerdSilent, true},
		{control.State{Called: now.Add(-time.Hour), NoSupernode: "x"}, nil, corev1.ConditionFalse, ReasonContainerdSilent, true},
		{control.State{}, errDown, corev1.ConditionFalse, ReasonNodeDown, false},
		{control.State{}, fmt.Errorf("%w within 10s", control.ErrSilent), corev1.ConditionFalse, ReasonNodeSilent, false},
		{control.State{}, fmt.Errorf("%w (%w)", control.ErrNoDaemon, fs.ErrPermission), corev1.ConditionUnknown, ReasonCannotAsk, false},
		{control.State{}, errors.New("daemon: this is a supernode"), corev1.ConditionUnknown, ReasonCannotAsk, false},
	} {
		v := judge(&c.st, c.err, now)
		if v.status != c.status || v.reason != c.reason || v.starts != c.starts || v.message == "" || len(v.message) > maxMessage+10 {
			t.Errorf("%+v, %v: %+v", c.st, c.err, v)
		}
		all = append(all, v.reason)
	}
	for _, r := range Reasons {
		if !slices.Contains(all, r) {
			t.Errorf("no case has reason %s", r)
		}
	}
}

// TestSteady: what is good is said at once, and what is not when it has lasted.
func TestSteady(t *testing.T) {
	s := steady{grace: 20 * time.Second}
	start := time.Unix(1000, 0)
	good, bad := verdict{status: corev1.ConditionTrue}, verdict{status: corev1.ConditionFalse, reason: "a"}
	other := verdict{status: corev1.ConditionFalse, reason: "b"}
	for i, c := range []struct {
		at   int // seconds
		v    verdict
		want *verdict
	}{
		{0, bad, nil}, {19, bad, nil}, {20, bad, &bad}, {21, other, &bad}, {30, bad, &bad}, {31, other, &bad}, {51, other, &other},
		{52, good, &good}, {53, bad, &good}, {60, good, &good}, {61, bad, &good}, {80, other, &good}, {81, bad, &bad},
	} {
		got := s.next(c.v, start.Add(time.Duration(c.at)*time.Second))
		if (got == nil) != (c.want == nil) || got != nil && *got != *c.want {
			t.Errorf("step %d: %+v, want %+v", i, got, c.want)
		}
	}
}

func TestBackoff(t *testing.T) {
	var b backoff
	now := time.Unix(1000, 0)
	for i := range 20 {
		if !b.ready(now) {
			t.Fatalf("try %d cannot be made", i)
		}
		wait := b.failed(now)
		if wait < firstPause/2 || wait > lastPause*3/2 || b.ready(now.Add(wait-1)) {
			t.Errorf("after try %d: %v", i, wait)
		}
		now = now.Add(wait)
	}
	if b.pause != lastPause {
		t.Errorf("the pause has grown to %v", b.pause)
	}
	b.worked()
	if b.failed(now); b.pause != firstPause {
		t.Errorf("after a success: %v", b.pause)
	}
}

func TestNormalize(t *testing.T) {
	digest := "@sha256:" + strings.Repeat("ab", 32)
	for in, want := range map[string]string{
		"redis": "docker.io/library/redis:latest", "redis:7": "docker.io/library/redis:7", "a.example/b/c:v1": "a.example/b/c:v1",
		"a.example/b:v1" + digest: "a.example/b" + digest, "": "", "NOT A NAME": "NOT A NAME",
	} {
		if got := normalize(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
