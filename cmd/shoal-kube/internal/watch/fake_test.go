package watch

import (
	"sync/atomic"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/kubernetes/typed/core/v1/fake"
	clienttesting "k8s.io/client-go/testing"
)

// TestFake runs the suite on client-go's fake. TestServer runs it on a real API server.
func TestFake(t *testing.T) {
	client := &fake.FakeCoreV1{Fake: &clienttesting.Fake{}}
	var writes atomic.Int64
	client.AddReactor("patch", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		writes.Add(1)
		return false, nil, nil
	})
	objects := clienttesting.NewObjectTracker(scheme.Scheme, scheme.Codecs.UniversalDecoder())
	client.AddReactor("*", "*", clienttesting.ObjectReaction(objects))
	suite(t, api{admin: client, program: client, writes: writes.Load})
}
