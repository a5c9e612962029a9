package integration

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
)

// TestNet is about the lab itself: measurements in namespaces mean something only
// if traffic goes over the links, is counted there, and stops when they are cut.
func TestNet(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	net, err := l.NewNet(ctx, 2)
	noError(t, err)
	far, err := net.NewHost(ctx, "far", 1, 10*lab.Gigabit)
	noError(t, err)
	near, err := net.NewHost(ctx, "near", 0, 0)
	noError(t, err)
	reg, err := l.At(far).StartRegistry(ctx, "registry", l.Path("storage"), "")
	noError(t, err)
	blob := lab.NewBlob(lab.MediaTypeLayer, make([]byte, 1<<20))
	noError(t, reg.PushBlob(ctx, "a", blob))

	client := &http.Client{Transport: &http.Transport{DialContext: near.Dial, DisableKeepAlives: true}}
	get := func(timeout time.Duration) error {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+reg.Addr+"/v2/a/blobs/"+blob.Digest, nil)
		noError(t, err)
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		data := make([]byte, 4<<10)
		for err == nil {
			_, err = resp.Body.Read(data)
		}
		return nil
	}
	noError(t, get(10*time.Second))
	n, err := reg.Requests(ctx)
	noError(t, err)
	noError(t, get(10*time.Second))
	// It counts a request a moment after its answer.
	noError(t, lab.WaitFor(ctx, "one request more", 10*time.Second, func() error {
		again, err := reg.Requests(ctx)
		if err == nil && again <= n {
			err = fmt.Errorf("the registry counts %d after %d", again, n)
		}
		return err
	}))
	into, out, err := net.Crossed(1)
	noError(t, err)
	received, _, err := near.Bytes()
	noError(t, err)
	if out < blob.Size || received < blob.Size || into > blob.Size/2 {
		t.Errorf("a blob of %d bytes came from zone 1 to zone 0: %d bytes left zone 1, %d entered it, the host received %d", blob.Size, out, into, received)
	}
	noError(t, net.Partition(ctx, 1, true))
	if err := get(time.Second); err == nil {
		t.Error("an answer came through a cut uplink")
	}
	noError(t, net.Partition(ctx, 1, false))
	noError(t, get(10*time.Second))
}
