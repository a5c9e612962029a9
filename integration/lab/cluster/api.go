package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

// Object is a Kubernetes object as JSON has it.
type Object = map[string]any

// url of a path of the API.
func (c *Cluster) url(path string) string { return "https://" + c.Control.IP + ":6443" + path }

// trust makes the client for the API server, which signs its own certificate.
func (c *Cluster) trust(cert string) error {
	ca, err := os.ReadFile(cert)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	transport := &http.Transport{DialContext: c.Control.Dial, TLSClientConfig: &tls.Config{RootCAs: pool}}
	c.client = &http.Client{Transport: transport, Timeout: time.Minute}
	return nil
}

// Get reads a path of the API into v, if v is not nil.
func (c *Cluster) Get(ctx context.Context, path string, v any) error {
	return c.do(ctx, http.MethodGet, path, "", nil, v)
}

// Create makes an object; path is that of its kind, such as
// /api/v1/namespaces/default/pods.
func (c *Cluster) Create(ctx context.Context, path string, o Object) error {
	return c.do(ctx, http.MethodPost, path, "application/json", o, nil)
}

// Patch changes an object by a strategic merge patch, as `kubectl patch` does.
func (c *Cluster) Patch(ctx context.Context, path string, o Object) error {
	return c.do(ctx, http.MethodPatch, path, "application/strategic-merge-patch+json", o, nil)
}

// Delete deletes an object, or all in a list.
func (c *Cluster) Delete(ctx context.Context, path string) error {
	return c.do(ctx, http.MethodDelete, path, "application/json", nil, nil)
}

func (c *Cluster) do(ctx context.Context, method, path, mediaType string, in Object, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.url(path), body)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	req.Header.Set("Content-Type", mediaType)
	resp, err := c.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, b)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(b, out)
}

// Kubectl runs kubectl on the machine of the control plane and returns its standard output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.Control.Lab.Run(ctx, programs(c.Lab, "kubectl"), append([]string{"--kubeconfig", c.Kubeconfig}, args...)...)
}

// PodStatus is what tests look at of a pod's status.
type PodStatus struct {
	Phase      string
	PodIP      string
	Conditions []struct{ Type, Status, Reason, Message string }

	ContainerStatuses []struct {
		Ready        bool
		RestartCount int
		Image        string
		ImageID      string
		ContainerID  string
		State        struct {
			Waiting *struct{ Reason, Message string }
		}
	}
}

// podPath is where a pod is.
func podPath(namespace, name string) string {
	return "/api/v1/namespaces/" + namespace + "/pods/" + name
}

// Pod returns a pod's status.
func (c *Cluster) Pod(ctx context.Context, namespace, name string) (*PodStatus, error) {
	var pod struct{ Status PodStatus }
	err := c.Get(ctx, podPath(namespace, name), &pod)
	return &pod.Status, err
}

// is says whether a condition holds.
func (s *PodStatus) is(condition string) bool {
	for _, x := range s.Conditions {
		if x.Type == condition {
			return x.Status == "True"
		}
	}
	return false
}

// Ready returns nil for a pod that is ready, else what it waits for.
func (s *PodStatus) Ready() error {
	if s.is("Ready") {
		return nil
	}
	var why []string
	for _, x := range s.Conditions {
		if x.Message != "" {
			why = append(why, x.Type+": "+x.Message)
		}
	}
	for _, x := range s.ContainerStatuses {
		if w := x.State.Waiting; w != nil {
			why = append(why, w.Reason+": "+w.Message)
		}
	}
	return fmt.Errorf("the pod is %s: %s", s.Phase, strings.Join(why, "; "))
}

// Restarts is how often containers of the pod were restarted.
func (s *PodStatus) Restarts() (n int) {
	for _, x := range s.ContainerStatuses {
		n += x.RestartCount
	}
	return n
}

// Events returns the messages of the events about a pod, oldest first, each with its
// reason before it.
func (c *Cluster) Events(ctx context.Context, namespace, name string) ([]string, error) {
	var list struct {
		Items []struct{ Reason, Message string }
	}
	err := c.Get(ctx, "/api/v1/namespaces/"+namespace+"/events?fieldSelector=involvedObject.name="+name, &list)
	var all []string
	for _, e := range list.Items {
		all = append(all, e.Reason+": "+e.Message)
	}
	return all, err
}
