package watch

import (
	"sync/atomic"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/kubernetes/typed/core/v1/fake"
	clienttesting "k8s.io/client-go/testing"
)

// newFake returns client-go's fake, which counts writes of nodes.
func newFake() (*fake.FakeCoreV1, *atomic.Int64) {
	client, writes := &fake.FakeCoreV1{Fake: &clienttesting.Fake{}}, &atomic.Int64{}
	client.AddReactor("patch", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		writes.Add(1)
		return false, nil, nil
	})
	objects := clienttesting.NewObjectTracker(scheme.Scheme, scheme.Codecs.UniversalDecoder())
	client.AddReactor("*", "*", clienttesting.ObjectReaction(objects))
	return client, writes
}

// TestFake runs the suite on client-go's fake. TestServer runs it on a real API server.
func TestFake(t *testing.T) {
	client, writes := newFake()
	suite(t, api{admin: client, program: client, forget: client, writes: writes.Load})
}
