package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/shoalfs/shoal/integration/lab"
	"github.com/shoalfs/shoal/integration/report"
)

// warmBars are the bars of pull + READY against overlayfs, supernode warm.
var warmBars = map[string]float64{
	"torch": 0.20, "python-django": 0.25, "node-express": 0.25, "debian": 0.20, "nginx": 0.20, "redis": 0.20,
}

// secondsOf begins the name of the rows that say how long a start took, for docs.go.
const secondsOf = "pull + READY: "

func startCommand(o *options) *cobra.Command {
	unlearned := true
	cmd := &cobra.Command{
		Use:   "start",
		Short: "Pull and start of the real images against overlayfs",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return benchStart(cmd.Context(), o, unlearned) },
	}
	cmd.Flags().BoolVar(&unlearned, "unlearned", unlearned, "also measure a warm supernode that has seen no start")
	return cmd
}

// startFigures are the samples of one image, a sample a run.
type startFigures struct {
	overlay, cold, warm []float64 // seconds of pull + READY
	unlearned           []float64 // the same as warm, without startup profiles
	pullOver            []float64 // seconds of a pull over what manifest and config cost
	indexBytes          []float64 // bytes of indexes that reached the node
}

func (f *startFigures) ratios(part []float64) []float64 {
	r := make([]float64, len(part))
	for i := range part {
		r[i] = part[i] / f.overlay[i]
	}
	return r
}

func benchStart(ctx context.Context, o *options, unlearned bool) (err error) {
	images := []string{"public"}
	if len(o.images) > 0 {
		images = o.images
	}
	w, err := newWorld(ctx, o, images...)
	if err != nil {
		return err
	}
	w.unlearned = unlearned
	defer func() { err = errors.Join(err, w.Close()) }()
	began, err := readProcessorTime()
	if err != nil {
		return err
	}
	figures := map[string]*startFigures{}
	for run := range o.runs {
		for _, image := range allImages {
			if !o.wanted(image) {
				continue
			}
			if figures[image] == nil {
				figures[image] = &startFigures{}
			}
			if err := w.measureStart(ctx, image, figures[image]); err != nil {
				return fmt.Errorf("%s, run %d: %w", image, run+1, err)
			}
		}
	}
	var r report.Report
	if f := figures["torch"]; f != nil {
		m, err := w.manifest(ctx, "torch", "v1")
		if err != nil {
			return err
		}
		var share []float64
		for _, b := range f.indexBytes {
			share = append(share, 100*b/float64(m.compressed()))
		}
		r.Add("metadata that reaches the node before start, of the compressed image: torch", "%", report.AtMost, 0.5, share...)
	}
	for _, image := range allImages {
		if f := figures[image]; f != nil {
			r.Add("pull over manifest and config, supernode has the index: "+image, "s", report.AtMost, 0.3, f.pullOver...)
		}
	}
	for _, image := range allImages {
		if f := figures[image]; f != nil && warmBars[image] > 0 {
			r.Add("supernode warm, pull + READY against overlayfs: "+image, "x", report.AtMost, warmBars[image], f.ratios(f.warm)...)
		}
	}
	for _, image := range allImages {
		if f := figures[image]; f != nil && len(f.unlearned) > 0 {
			r.Note("the same, image never started before (no startup profile): "+image, "x", f.ratios(f.unlearned)...)
		}
	}
	for _, image := range allImages {
		if f := figures[image]; f != nil {
			r.Add("supernode cold, pull + READY against overlayfs: "+image, "x", report.AtMost, 0.7, f.ratios(f.cold)...)
		}
	}
	for _, image := range allImages {
		if f := figures[image]; f != nil {
			r.Note(secondsOf+image+", overlayfs", "s", f.overlay...)
			r.Note(secondsOf+image+", cold supernode", "s", f.cold...)
			r.Note(secondsOf+image+", warm supernode", "s", f.warm...)
		}
	}
	if o.wanted("python-django") {
		var shares []float64
		for range o.runs {
			x, err := w.measureTwoNodes(ctx, "python-django")
			if err != nil {
				return err
			}
			shares = append(shares, x)
		}
		r.Add("registry bytes, two nodes at once, cold supernode: python-django", "x", report.AtMost, 1, shares...)
	}
	if err := began.noteStolen(&r); err != nil {
		return err
	}
	if err := r.Print(os.Stdout); err != nil {
		return err
	}
	return r.Save(o.out, "start")
}

// measureStart takes one sample of everything about one image: overlayfs, shoal
// with a cold and then with a warm supernode, each on a fresh machine. Warm means
// that the image was started once in the datacenter: by the cold run, which
// leaves layers, index and startup profile on the supernode. At last the
// supernode forgets its profiles, as if the image had only been pulled before.
func (w *world) measureStart(ctx context.Context, image string, f *startFigures) error {
	ref := w.ref(image, "v1")
	plain, err := w.plain(ctx)
	if err != nil {
		return err
	}
	over, err := plain.pullAndRun(ctx, "overlayfs", ref, false)
	if err := errors.Join(err, plain.stop()); err != nil {
		return err
	}
	super, err := w.StartSupernode(ctx, w.name("s"), "")
	if err != nil {
		return err
	}
	first, err := w.lazy(ctx, super)
	if err != nil {
		return err
	}
	cold, err := first.pullAndRun(ctx, "shoal", ref, false)
	if err := errors.Join(err, first.stop()); err != nil {
		return err
	}
	if err := super.Settle(ctx, 5*time.Minute); err != nil {
		return err
	}
	warm, err := w.measureWarm(ctx, super, image)
	if err != nil {
		return err
	}
	say("%-14s overlayfs %.2f s, shoal cold %.2f s (%.2fx), warm %.2f s (%.2fx), pull %.2f s (manifest and config alone %.2f s), index %.2f MB",
		image, over.ready.Seconds(), cold.ready.Seconds(), cold.ready.Seconds()/over.ready.Seconds(),
		warm.ready.Seconds(), warm.ready.Seconds()/over.ready.Seconds(), warm.pulled.Seconds(), warm.metadata.Seconds(), warm.index/1e6)
	say("%-14s   of these, after the pull: overlayfs %.2f s, cold %.2f s, warm %.2f s", "",
		(over.ready - over.pulled).Seconds(), (cold.ready - cold.pulled).Seconds(), (warm.ready - warm.pulled).Seconds())
	say("%-14s   warm: %s", "", warm.node)
	f.overlay = append(f.overlay, over.ready.Seconds())
	f.cold = append(f.cold, cold.ready.Seconds())
	f.warm = append(f.warm, warm.ready.Seconds())
	f.pullOver = append(f.pullOver, (warm.pulled - warm.metadata).Seconds())
	f.indexBytes = append(f.indexBytes, warm.index)
	if !w.unlearned {
		return super.Stop()
	}
	if err := super.Stop(); err != nil {
		return err
	}
	if err := os.Remove(w.Path(super.Name, "profiles.db")); err != nil {
		return err
	}
	if super, err = w.RestartSupernode(ctx, super); err != nil {
		return err
	}
	unlearned, err := w.measureWarm(ctx, super, image)
	if err != nil {
		return err
	}
	say("%-14s   warm, without a profile: %.2f s (%.2fx), %s", "", unlearned.ready.Seconds(), unlearned.ready.Seconds()/over.ready.Seconds(), unlearned.node)
	f.unlearned = append(f.unlearned, unlearned.ready.Seconds())
	return super.Stop()
}

// warmStart is a start with a warm supernode.
type warmStart struct {
	start
	metadata time.Duration // what manifest and config alone cost
	index    float64       // bytes of indexes, with their profiles, that reached the node
	node     string        // what the node says of it
}

// measureWarm pulls and starts an image that the supernode has on a fresh machine.
func (w *world) measureWarm(ctx context.Context, super *lab.Supernode, image string) (*warmStart, error) {
	ref := w.ref(image, "v1")
	m, err := w.lazy(ctx, super)
	if err != nil {
		return nil, err
	}
	const indexBytes = `shoal_p2p_sent_bytes_total{kind="image"}`
	before, err := super.Metric(ctx, indexBytes)
	if err != nil {
		return nil, err
	}
	registry := w.link.Down()
	began := time.Now()
	if err := m.Pull(ctx, "shoal", ref); err != nil {
		return nil, err
	}
	s := &warmStart{start: start{pulled: time.Since(began)}}
	if n := w.link.Down() - registry; n > 1<<20 {
		return nil, fmt.Errorf("the pull with a warm supernode fetched %d bytes from the registry: layers were not lazy", n)
	}
	// After the pull, so that what the supernode had to ask the registry counts as
	// the pull's.
	if s.metadata, _, err = w.measureMetadata(ctx, image, m.node); err != nil {
		return nil, err
	}
	ready, err := m.RunReady(ctx, "shoal", ref, false)
	if err != nil {
		return nil, err
	}
	s.ready = s.pulled + ready
	after, err := super.Metric(ctx, indexBytes)
	if err != nil {
		return nil, err
	}
	s.index = after - before
	var v [4]float64
	for i, name := range []string{
		`shoal_node_fetched_bytes_total{priority="startup"}`, `shoal_node_fetched_bytes_total{priority="demand"}`,
		"shoal_node_demand_waits_total", "shoal_node_demand_wait_seconds_total",
	} {
		if v[i], err = m.node.Metric(ctx, name); err != nil {
			return nil, err
		}
	}
	s.node = fmt.Sprintf("%.1f MB by the profile, %.1f MB by reads, of which %.0f waited %.2f s in all", v[0]/1e6, v[1]/1e6, v[2], v[3])
	return s, m.stop()
}

// measureMetadata asks for what every pull asks for, the manifest by its tag and by
// its digest, and the config, on a connection of its own: a node's mirror, which wants
// a token first, or without a node the registry by way of the link. It returns how
// long that took and the bytes that came over the registry's link.
func (w *world) measureMetadata(ctx context.Context, image string, node *lab.Node) (time.Duration, int64, error) {
	man, err := w.manifest(ctx, image, "v1")
	if err != nil {
		return 0, 0, err
	}
	transport := &http.Transport{}
	client := &http.Client{Transport: transport}
	defer client.CloseIdleConnections()
	base, query := "http://"+w.link.Addr+"/v2/"+image, ""
	if node != nil {
		ca, err := os.ReadFile(node.MirrorCA)
		if err != nil {
			return 0, 0, err
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: x509.NewCertPool()}
		transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(ca)
		base, query = "https://"+node.Mirror+"/v2/"+image, "?ns="+w.link.Addr
	}
	token := ""
	ask := func(method, url string, want int) ([]byte, error) {
		req, err := http.NewRequestWithContext(ctx, method, url, nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Accept", manifestTypes)
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := client.Do(req)
		if err != nil {
			return nil, err
		}
		body, err := io.ReadAll(resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil {
			return nil, err
		}
		if resp.StatusCode != want {
			return nil, fmt.Errorf("%s %s: %s", method, url, resp.Status)
		}
		return body, nil
	}
	before := w.link.Down()
	began := time.Now()
	if node != nil { // as containerd does it: it is refused, and gets a token
		if _, err := ask(http.MethodHead, base+"/manifests/v1"+query, http.StatusUnauthorized); err != nil {
			return 0, 0, err
		}
		body, err := ask(http.MethodGet, "https://"+node.Mirror+"/token?service="+w.link.Addr+"&scope=repository:"+image+":pull", http.StatusOK)
		if err != nil {
			return 0, 0, err
		}
		var answer struct{ Token string }
		if err := json.Unmarshal(body, &answer); err != nil {
			return 0, 0, err
		}
		token = answer.Token
	}
	for _, q := range []struct{ method, path string }{
		{http.MethodHead, "/manifests/v1"},
		{http.MethodGet, "/manifests/v1"},
		{http.MethodGet, "/blobs/" + man.Config.Digest},
	} {
		if _, err := ask(q.method, base+q.path+query, http.StatusOK); err != nil {
			return 0, 0, err
		}
	}
	return time.Since(began), w.link.Down() - before, nil
}

// measureTwoNodes pulls one image on two machines at once with a cold supernode
// and returns the bytes that came from the registry, less manifest and config,
// which are fetched once as well, over the compressed size.
func (w *world) measureTwoNodes(ctx context.Context, image string) (float64, error) {
	ref := w.ref(image, "v1")
	man, err := w.manifest(ctx, image, "v1")
	if err != nil {
		return 0, err
	}
	_, metadata, err := w.measureMetadata(ctx, image, nil)
	if err != nil {
		return 0, err
	}
	super, err := w.StartSupernode(ctx, w.name("s"), "")
	if err != nil {
		return 0, err
	}
	var machines [2]*machine
	for i := range machines {
		if machines[i], err = w.lazy(ctx, super); err != nil {
			return 0, err
		}
	}
	before := w.link.Down()
	var both sync.WaitGroup
	var errs [2]error
	for i, m := range machines {
		both.Go(func() { _, errs[i] = m.pullAndRun(ctx, "shoal", ref, false) })
	}
	both.Wait()
	got := w.link.Down() - before - metadata
	err = errors.Join(errs[0], errs[1], machines[0].stop(), machines[1].stop(), super.Stop())
	x := float64(got) / float64(man.compressed())
	say("two nodes at once: %d bytes from the registry, the image has %d: %s", got, man.compressed(), strings.TrimSpace(fmt.Sprintf("%.4fx", x)))
	return round2(x), err
}
