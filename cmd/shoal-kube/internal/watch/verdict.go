package watch

import (
	"errors"
	"fmt"
	"io/fs"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/shoalfs/shoal/internal/control"
)

// Reasons of the condition.
const (
	ReasonReady            = "Ready"
	ReasonNoSupernode      = "NoSupernode"
	ReasonContainerdSilent = "ContainerdSilent"
	ReasonNodeDown         = "NodeDown"
	ReasonNodeSilent       = "NodeSilent"
	ReasonCannotAsk        = "CannotAsk"
)

// Reasons are all of them.
var Reasons = []string{ReasonReady, ReasonNoSupernode, ReasonContainerdSilent, ReasonNodeDown, ReasonNodeSilent, ReasonCannotAsk}

// containerdSilence is how long containerd may be silent. If its CRI plugin uses shoal, then
// it calls every 10 seconds for each snapshot, and the pod that watches has one.
const containerdSilence = 2 * time.Minute

// maxMessage bounds a message, in bytes: parts of it come from other machines.
const maxMessage = 1 << 10

// verdict is what there is to say about the shoal node.
type verdict struct {
	status  corev1.ConditionStatus
	reason  string
	message string
	// starts: pods start here.
	starts bool
}

func (v verdict) same(o verdict) bool { return v.status == o.status && v.reason == o.reason }

// judge makes a verdict of one answer, or of the error of asking.
func judge(st *control.State, err error, now time.Time) verdict {
	v := verdict{status: corev1.ConditionFalse}
	switch {
	case errors.Is(err, control.ErrSilent):
		v.reason, v.message = ReasonNodeSilent, fmt.Sprintf("new pods do not start, and containers on lazy images may wait: %v", err)
	case errors.Is(err, fs.ErrPermission) || err != nil && !errors.Is(err, control.ErrNoDaemon):
		v.status, v.reason, v.message = corev1.ConditionUnknown, ReasonCannotAsk, fmt.Sprintf("cannot ask the shoal node how it does: %v", err)
	case err != nil:
		v.reason, v.message = ReasonNodeDown, fmt.Sprintf("new pods do not start, and containers on lazy images wait for the shoal node or get I/O errors: %v", err)
	case st.Called.IsZero():
		v.reason, v.starts = ReasonContainerdSilent, true
		v.message = "containerd has not called the shoal node since the node was started: containerd unpacks images; run `shoal install containerd --restart` on the machine"
	case now.Sub(st.Called) > containerdSilence:
		v.reason, v.starts = ReasonContainerdSilent, true
		v.message = fmt.Sprintf("containerd has not called the shoal node since %s: containerd unpacks images; run `shoal install containerd --restart` on the machine", st.Called.UTC().Format(time.RFC3339))
	case st.NoSupernode != "":
		v.reason, v.starts = ReasonNoSupernode, true
		v.message = fmt.Sprintf("pods start, but containerd unpacks images that are new on this node: %s", st.NoSupernode)
	default:
		v.status, v.reason, v.starts = corev1.ConditionTrue, ReasonReady, true
		v.message = fmt.Sprintf("shoal %s serves this node: containerd uses it, and a supernode answers", st.Version)
	}
	if len(v.message) > maxMessage {
		v.message = v.message[:maxMessage] + " ..."
	}
	return v
}

// steady holds back verdicts that may pass by themselves.
type steady struct {
	grace time.Duration
	// since is when verdicts began to be others than what was said; zero: they are not.
	since time.Time
	said  *verdict
}

// next returns what there is to say after v; nil: nothing yet. That all is well is said at
// once, and anything else when it has not been as was said for the grace.
func (s *steady) next(v verdict, now time.Time) *verdict {
	as := s.said != nil && v.same(*s.said)
	if !as && s.since.IsZero() {
		s.since = now
	}
	if as || v.status == corev1.ConditionTrue || now.Sub(s.since) >= s.grace {
		s.said, s.since = &v, time.Time{}
	}
	return s.said
}
