//go:build kubernetes

package kubernetes

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/lab/cluster"
	"github.com/shoalfs/shoal/integration/report"
)

// TestMeasureUpgrade: a running pod's image is patched, as OpenKruise's CloneSet does;
// sandbox and address stay. Time without service is what a client sees that asks all the
// time.
func TestMeasureUpgrade(t *testing.T) {
	s := newSite(t)
	v1, v2 := server(s.real, "python-django", "v1"), server(s.real, "python-django", "v2")
	away := map[string][]float64{}
	for range runs {
		for _, name := range []string{"one", "plain-one"} {
			n := s.node(t, name)
			for _, prePulled := range []bool{false, true} {
				s.forget(t, n)
				s.warm(t, v1["image"].(string))
				s.warm(t, v2["image"].(string))
				if prePulled {
					s.prePull(t, n, v2["image"].(string))
				}
				set, _ := s.run(t, "upgrade", podSpec{node: on(n), container: v1})
				if n.Shoal != nil {
					noError(t, n.Shoal.WaitLocal(t.Context(), v1["image"].(string), 5*time.Minute))
				}
				key := fmt.Sprint(name, prePulled)
				away[key] = append(away[key], s.upgrade(t, set, v2["image"].(string)).Seconds())
				if n.Shoal != nil {
					noError(t, lazy(t.Context(), n, v2["image"].(string)))
				}
				noError(t, set.remove(t))
			}
		}
	}
	lazily, pulled, cold, warm := away["onefalse"], away["onetrue"], away["plain-onefalse"], away["plain-onetrue"]
	const what = "in-place upgrade, time without service: "
	figure(t, what+"lazy", "s", "", 0, lazily...)
	figure(t, what+"after pre-pull", "s", "", 0, pulled...)
	figure(t, what+"overlayfs cold", "s", "", 0, cold...)
	figure(t, what+"overlayfs warm", "s", "", 0, warm...)
	figure(t, what+"lazy, against overlayfs cold", "x", report.AtMost, 0.6, ratios(lazily, cold)...)
	figure(t, what+"after pre-pull, against overlayfs warm", "x", report.AtMost, 1.1, ratios(pulled, warm)...)
}

// prePull brings an image to a node as a Job would, and with shoal all of its bytes.
func (s *site) prePull(t *testing.T, n *cluster.Node, ref string) {
	t.Helper()
	set := s.create(t, "prepull", podSpec{
		node: on(n), container: object{"image": ref, "command": []string{"true"}}, spec: object{"restartPolicy": "Never"},
	})
	noError(t, lab.WaitFor(t.Context(), "pre-pull of "+ref, 5*time.Minute, func() error {
		st, err := s.Pod(t.Context(), set.namespace, set.first())
		if err == nil && st.Phase != "Succeeded" {
			err = st.Ready()
		}
		return err
	}))
	if n.Shoal != nil {
		must(n.Lab.Run(t.Context(), "shoal", "prefetch", "--local", ref))(t)
	}
	noError(t, set.remove(t))
}

// upgrade patches the pod's image, and returns for how long nobody answered.
func (s *site) upgrade(t *testing.T, set *pods, ref string) time.Duration {
	t.Helper()
	ctx := t.Context()
	path := set.path() + "/" + set.first()
	before := must(s.Pod(ctx, set.namespace, set.first()))(t)
	c := s.startClient(ctx, before.PodIP)
	noError(t, s.Patch(ctx, path, object{"spec": object{"containers": []object{{"name": "main", "image": ref}}}}))
	noError(t, lab.WaitFor(ctx, "the new image", 5*time.Minute, func() error {
		st, err := s.Pod(ctx, set.namespace, set.first())
		if err != nil {
			return err
		}
		if st.ContainerStatuses[0].ContainerID == before.ContainerStatuses[0].ContainerID {
			return fmt.Errorf("the old container is there")
		}
		return st.Ready()
	}))
	after := must(s.Pod(ctx, set.namespace, set.first()))(t)
	if after.PodIP != before.PodIP {
		t.Errorf("the pod had the address %s and has %s", before.PodIP, after.PodIP)
	}
	return c.stop()
}

// client asks a server all the time.
type client struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	served []time.Time
}

func (s *site) startClient(ctx context.Context, ip string) *client {
	ctx, cancel := context.WithCancel(ctx)
	c := &client{cancel: cancel}
	transport := &http.Transport{DialContext: s.Control.Dial, DisableKeepAlives: true}
	h := &http.Client{Transport: transport, Timeout: time.Second}
	c.wg.Go(func() {
		for ctx.Err() == nil {
			if resp, err := h.Get("http://" + ip + ":8000/"); err == nil {
				_, err = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
				if err == nil && resp.StatusCode == http.StatusOK {
					c.served = append(c.served, time.Now())
				}
			}
			wait(ctx, 20*time.Millisecond)
		}
	})
	return c
}

// stop returns the longest time between two answers.
func (c *client) stop() time.Duration {
	c.cancel()
	c.wg.Wait()
	var gaps []time.Duration
	for i := range len(c.served) - 1 {
		gaps = append(gaps, c.served[i+1].Sub(c.served[i]))
	}
	return slices.Max(append(gaps, 0))
}
