package watch

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"

	"github.com/shoalfs/shoal/internal/control"
)

// Reasons of events.
const (
	EventLazy        = "ImageLazy"
	EventNotLazy     = "ImageNotLazy"
	EventQuarantined = "ImageQuarantined"
	EventReadFailed  = "ImageReadFailed"
)

// Events are the reasons of all events.
var Events = []string{EventLazy, EventNotLazy, EventQuarantined, EventReadFailed}

// teller writes events for the pods of one node that use an image.
type teller struct {
	client   typedcorev1.CoreV1Interface
	node     string
	recorder record.EventRecorder
	log      *slog.Logger
}

// tell writes events for notices. If it returns an error, then it has written none.
func (t *teller) tell(ctx context.Context, notices []control.Notice) error {
	users, err := t.users(ctx)
	if err != nil {
		return err
	}
	for _, n := range notices {
		kind, reason, message := describe(n)
		if reason == "" {
			continue // of a newer version
		}
		var told []*corev1.ObjectReference
		for _, ref := range n.Refs {
			for _, user := range users[normalize(ref)] {
				// A layer may be in several images of a container's pod: that is one event.
				if !slices.ContainsFunc(told, func(o *corev1.ObjectReference) bool { return *o == *user }) {
					told = append(told, user)
					t.recorder.Event(user, kind, reason, fmt.Sprintf(message, ref))
				}
			}
		}
		t.log.Info("an image of this node", "what", n.What, "images", strings.Join(n.Refs, " "), "events", len(told))
	}
	return nil
}

// users returns the containers on this node by image.
func (t *teller) users(ctx context.Context) (map[string][]*corev1.ObjectReference, error) {
	// Version 0: from the API server's memory, where pods are sorted by node.
	list, err := t.client.Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + t.node, ResourceVersion: "0"})
	if err != nil {
		return nil, fmt.Errorf("list the pods of node %s: %w", t.node, err)
	}
	users := map[string][]*corev1.ObjectReference{}
	for i := range list.Items {
		p := &list.Items[i]
		if p.Spec.NodeName != t.node || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		add := func(image, path string) {
			image = normalize(image)
			users[image] = append(users[image], &corev1.ObjectReference{
				APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID, FieldPath: path,
			})
		}
		for _, c := range p.Spec.InitContainers {
			add(c.Image, "spec.initContainers{"+c.Name+"}")
		}
		for _, c := range p.Spec.Containers {
			add(c.Image, "spec.containers{"+c.Name+"}")
		}
		for _, c := range p.Spec.EphemeralContainers {
			add(c.Image, "spec.ephemeralContainers{"+c.Name+"}")
		}
		for _, v := range p.Spec.Volumes {
			if v.Image != nil {
				add(v.Image.Reference, "spec.volumes{"+v.Name+"}")
			}
		}
	}
	return users, nil
}

// normalize returns an image's name as containerd has it.
func normalize(image string) string {
	named, err := reference.ParseDockerRef(image)
	if err != nil {
		return image
	}
	return named.String()
}

// describe says what an event is of a notice. message has a %s for the image. An empty
// reason: this version does not know it.
func describe(n control.Notice) (kind, reason, message string) {
	why, _, _ := strings.Cut(n.Why, "\n")
	why = strings.ReplaceAll(why, "%", "%%")
	switch n.What {
	case control.Lazy:
		return corev1.EventTypeNormal, EventLazy, "Image %s is lazy: containers start before all of it is on the node"
	case control.Unpacked:
		kind = corev1.EventTypeWarning
		if n.Cause == "config" {
			kind = corev1.EventTypeNormal
		}
		return kind, EventNotLazy, fmt.Sprintf("Image %%s is not lazy, containerd unpacks it (%s): %s", cmp.Or(n.Cause, "other"), why)
	case control.Quarantined:
		return corev1.EventTypeWarning, EventQuarantined, fmt.Sprintf("Layer %s of image %%s is quarantined, its content is not what the image says: %s", n.Layer, why)
	case control.ReadFailed:
		return corev1.EventTypeWarning, EventReadFailed, fmt.Sprintf("A process got an I/O error (EIO) from layer %s of image %%s: %s", n.Layer, why)
	default:
		return "", "", ""
	}
}
