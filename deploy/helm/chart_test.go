package main

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/validation"
	k8syaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

const (
	chart = "shoal"
	docs  = "../../docs/kubernetes.md"
)

var update = flag.Bool("update", false, "write the table of values in docs/kubernetes.md again")

type values = map[string]any

// cases are values of clusters that differ in what the chart renders.
var cases = map[string]values{
	"the defaults": {},
	"all of it": {
		"image": values{"repository": "registry.example.com/shoal", "tag": "v1.2.3", "pullSecrets": []any{"pull"}},
		"supernode": values{
			"replicas": 3, "hostNetwork": true, "env": values{"HTTPS_PROXY": "http://proxy:3128"},
			"storage":      values{"size": "1Ti", "className": "fast"},
			"config":       "max_peers = 20000\n[registry]\ningests = 8\n",
			"registries":   values{"registry.example.com:5000": values{"hosts.toml": "server = \"http://registry.example.com:5000\"\n", "ca.pem": "x"}},
			"nodeSelector": values{"disk": "big"}, "tolerations": []any{values{"operator": "Exists"}},
		},
		"node": values{
			"config": "cache_quota = \"50GiB\"\n[images]\nnever = [\"docker.io/*\"]\n", "rackLabel": "example.com/rack",
			"nodeSelector": values{"kubernetes.io/os": "linux"}, "maxUnavailable": 3,
			"containerd": values{"flags": []any{"--config=/etc/containerd/config.toml"}, "restartCommand": "rc-service containerd restart"},
		},
		"monitoring": values{"enabled": true, "rules": true, "labels": values{"release": "prometheus"}},
	},
	"addresses":            {"supernode": values{"replicas": 2, "addresses": []any{"10.0.0.5:7700", "[2001:db8::5]:7700"}}},
	"supernodes elsewhere": {"supernode": values{"enabled": false}, "supernodes": []any{id + "@10.0.0.5:7700"}, "token": values{"existingSecret": "token"}},
	"a pinned image":       {"image": values{"tag": "v1.2.3@sha256:" + strings.Repeat("0a", 32)}},
	"a long tag":           {"image": values{"tag": "_" + strings.Repeat("v1.2-", 25)}},
	"a subchart":           {"enabled": true, "global": values{"imageRegistry": "x"}},
	"a token of one's own": {"token": values{"existingSecret": "token"}, "networkPolicy": false},
}

const id = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"

// TestLint: helm lint finds nothing, with any of the values.
func TestLint(t *testing.T) {
	for name, v := range cases {
		for _, m := range lint.RunAll(chart, v, "shoal-system").Messages {
			if m.Severity > support.InfoSev {
				t.Errorf("%s: %v", name, m)
			}
		}
	}
}

// render returns the objects that the chart has with these values.
func render(t *testing.T, v values) ([]runtime.Object, error) {
	t.Helper()
	c, err := loader.Load(chart)
	if err != nil {
		t.Fatal(err)
	}
	all, err := util.ToRenderValues(c, v, common.ReleaseOptions{Name: "shoal", Namespace: "shoal-system", IsInstall: true}, common.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	files, err := engine.Render(c, all)
	if err != nil {
		return nil, err
	}
	var objects []runtime.Object
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasSuffix(name, "NOTES.txt") {
			continue
		}
		docs := k8syaml.NewYAMLReader(bufio.NewReader(strings.NewReader(files[name])))
		for {
			doc, err := docs.Read()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(bytes.TrimSpace(doc)) == 0 {
				continue
			}
			if bytes.Contains(doc, []byte("apiVersion: monitoring.coreos.com/v1")) {
				u := &unstructured.Unstructured{}
				if err := k8syaml.Unmarshal(doc, &u.Object); err != nil {
					t.Errorf("%s: %v in\n%s", name, err, doc)
				}
				objects = append(objects, u)
				continue
			}
			if o := decode(t, name, doc); o != nil {
				objects = append(objects, o)
			}
		}
	}
	return objects, nil
}

// decode returns the object of a document, as the API does; nil: it is not one.
func decode(t *testing.T, name string, doc []byte) runtime.Object {
	t.Helper()
	o, _, err := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict).UniversalDeserializer().Decode(doc, nil, nil)
	if err != nil {
		t.Errorf("%s: %v in\n%s", name, err, doc)
	}
	return o
}

// find returns the object of a type with this name.
func find[T interface {
	runtime.Object
	GetName() string
}](t *testing.T, objects []runtime.Object, name string) T {
	t.Helper()
	for _, o := range objects {
		if o, ok := o.(T); ok && o.GetName() == name {
			return o
		}
	}
	var none T
	t.Fatalf("no %T is called %s", none, name)
	return none
}

// TestRights: the pods on the nodes may do what docs/kubernetes.md says, and no more; that
// table is made of what shoal-kube watch needs.
func TestRights(t *testing.T) {
	page, err := os.ReadFile(docs)
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(page), "<!-- rights of shoal-kube watch -->")
	table, _, ok2 := strings.Cut(table, "<!-- end of rights of shoal-kube watch -->")
	if !ok || !ok2 {
		t.Fatal("the table of rights is gone")
	}
	want, got := map[string]bool{}, map[string]bool{}
	for _, row := range regexp.MustCompile("(?m)^\\| core \\| `([^`]+)` \\| ([^|]+) \\|").FindAllStringSubmatch(table, -1) {
		for verb := range strings.SplitSeq(row[2], ", ") {
			want[row[1]+" "+verb] = true
		}
	}
	objects, err := render(t, values{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range find[*rbacv1.ClusterRole](t, objects, "shoal-node").Rules {
		for _, resource := range r.Resources {
			for _, verb := range r.Verbs {
				got[resource+" "+verb] = true
			}
		}
	}
	if !maps.Equal(got, want) {
		t.Errorf("the chart gives %v, and the page says %v", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
}

// TestRender: with any of the values, each object is one of the API's, and is named and
// selected consistently.
func TestRender(t *testing.T) {
	for name, v := range cases {
		t.Run(name, func(t *testing.T) {
			objects, err := render(t, v)
			if err != nil {
				t.Fatal(err)
			}
			seen := map[string]bool{}
			for _, o := range objects {
				m := o.(interface {
					GetName() string
					GetLabels() map[string]string
				})
				key := fmt.Sprintf("%T %s", o, m.GetName())
				if seen[key] {
					t.Errorf("%s is there twice", key)
				}
				seen[key] = true
				if m.GetLabels()["app.kubernetes.io/instance"] != "shoal" {
					t.Errorf("%s has the labels %v", key, m.GetLabels())
				}
				for _, s := range validation.IsDNS1123Subdomain(m.GetName()) {
					t.Errorf("%s: %s", key, s)
				}
				labelsAreValid(t, key, m.GetLabels())
				switch o := o.(type) {
				case *appsv1.DaemonSet:
					labelsAreValid(t, key, o.Spec.Template.Labels)
				case *appsv1.StatefulSet:
					labelsAreValid(t, key, o.Spec.Template.Labels)
				case *batchv1.Job:
					labelsAreValid(t, key, o.Spec.Template.Labels)
				}
			}
			set := find[*appsv1.DaemonSet](t, objects, "shoal-node")
			selects(t, set.Spec.Selector.MatchLabels, set.Spec.Template.Labels)
			if v["supernodes"] != nil {
				for key := range seen {
					if strings.Contains(key, "shoal-supernode") {
						t.Errorf("%s is there although the supernodes are elsewhere", key)
					}
				}
				return
			}
			super := find[*appsv1.StatefulSet](t, objects, "shoal-supernode")
			selects(t, super.Spec.Selector.MatchLabels, super.Spec.Template.Labels)
			for i := range *super.Spec.Replicas {
				one := find[*corev1.Service](t, objects, fmt.Sprintf("shoal-supernode-%d", i))
				delete(one.Spec.Selector, "statefulset.kubernetes.io/pod-name")
				selects(t, one.Spec.Selector, super.Spec.Template.Labels)
			}
			role := find[*rbacv1.Role](t, objects, "shoal-supernode")
			for _, r := range role.Rules {
				if len(r.ResourceNames) == 0 {
					t.Errorf("the supernodes may %v all %v", r.Verbs, r.Resources)
				}
			}
		})
	}
}

func labelsAreValid(t *testing.T, of string, labels map[string]string) {
	t.Helper()
	for k, v := range labels {
		for _, s := range validation.IsValidLabelValue(v) {
			t.Errorf("%s: %s=%s: %s", of, k, v, s)
		}
	}
}

func selects(t *testing.T, selector, labels map[string]string) {
	t.Helper()
	for k, v := range selector {
		if labels[k] != v {
			t.Errorf("%s=%s selects nothing of %v", k, v, labels)
		}
	}
}

// TestSecrets: the chart never has a key or the token, so an upgrade cannot change them.
func TestSecrets(t *testing.T) {
	objects, err := render(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"shoal-supernode-keys", "shoal-join"} {
		if s := find[*corev1.Secret](t, objects, name); len(s.Data)+len(s.StringData) > 0 {
			t.Errorf("%s has data", name)
		}
	}
}

// TestUpgradesSelectors: the fields that no upgrade may change do not depend on values.
func TestUpgradesSelectors(t *testing.T) {
	before, err := render(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	after, err := render(t, cases["all of it"])
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []func([]runtime.Object) any{
		func(o []runtime.Object) any { return find[*appsv1.DaemonSet](t, o, "shoal-node").Spec.Selector },
		func(o []runtime.Object) any { return find[*appsv1.StatefulSet](t, o, "shoal-supernode").Spec.Selector },
		func(o []runtime.Object) any {
			return find[*appsv1.StatefulSet](t, o, "shoal-supernode").Spec.PodManagementPolicy
		},
	} {
		if a, b := fmt.Sprint(f(before)), fmt.Sprint(f(after)); a != b {
			t.Errorf("%s became %s", a, b)
		}
	}
}

// TestRevision: values that change what nodes join with run the installers again, which
// wait for the Secret that the supernodes write for these values. Others do not.
func TestRevision(t *testing.T) {
	revision := func(v values) string {
		t.Helper()
		objects, err := render(t, v)
		if err != nil {
			t.Fatal(err)
		}
		var found []string
		for _, args := range [][]string{
			find[*appsv1.StatefulSet](t, objects, "shoal-supernode").Spec.Template.Spec.InitContainers[0].Args,
			find[*appsv1.DaemonSet](t, objects, "shoal-node").Spec.Template.Spec.InitContainers[0].Args,
		} {
			for _, a := range args {
				if word, ok := strings.CutPrefix(a, "--revision="); ok {
					found = append(found, word)
				}
			}
		}
		if len(found) != 2 || found[0] == "" || found[0] != found[1] {
			t.Errorf("%v: the supernodes write and the installers wait for %q", v, found)
		}
		return strings.Join(found, " ")
	}
	seen := map[string]values{}
	for _, v := range []values{
		{},
		{"supernode": values{"replicas": 2}},
		{"supernode": values{"addresses": []any{"10.0.0.5:7700"}}},
		{"supernode": values{"addresses": []any{"10.0.0.6:7700"}}},
		{"token": values{"existingSecret": "a"}},
		{"token": values{"existingSecret": "b"}},
	} {
		r := revision(v)
		if before, ok := seen[r]; ok {
			t.Errorf("%v and %v have the same revision", before, v)
		}
		seen[r] = v
	}
	// The Services and their cluster IPs stay.
	if r := revision(values{"supernode": values{"hostNetwork": true, "replicas": 1.0, "config": "max_peers = 20000\n"}}); len(seen[r]) > 0 || seen[r] == nil {
		t.Errorf("installers run again although nodes join as before")
	}
}

// TestConfigs: what the values say of node.toml and supernode.toml gets to the daemons as
// it is, and `shoal config check` takes it.
func TestConfigs(t *testing.T) {
	bin := os.Getenv("SHOAL_BIN")
	if bin == "" {
		bin = "../../bin"
	}
	shoal := filepath.Join(bin, "shoal")
	if _, err := os.Stat(shoal); err != nil {
		t.Skipf("%v: `make build` first", err)
	}
	for name, v := range cases {
		objects, err := render(t, v)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			c, ok := o.(*corev1.ConfigMap)
			if !ok {
				continue
			}
			for _, role := range []string{"node", "supernode"} {
				text, ok := c.Data[role+".toml"]
				if !ok {
					continue
				}
				file := filepath.Join(t.TempDir(), role+".toml")
				if err := os.WriteFile(file, []byte("version = 1\n"+text), 0o600); err != nil {
					t.Fatal(err)
				}
				if out, err := exec.Command(shoal, "config", "check", role, file).CombinedOutput(); err != nil {
					t.Errorf("%s: %s.toml: %v: %s\n%s", name, role, err, out, text)
				}
			}
		}
	}
}

// TestBadValues: a value that cannot be is refused, with its name.
func TestBadValues(t *testing.T) {
	for _, c := range []struct {
		values values
		want   string
	}{
		{values{"supernod": values{}}, "supernod"},
		{values{"supernode": values{"replica": 2}}, "replica"},
		{values{"supernode": values{"replicas": 0}}, "replicas"},
		{values{"supernode": values{"storage": values{"size": "lots"}}}, "size"},
		{values{"supernode": values{"config": values{"max_peers": 3}}}, "config"},
		{values{"node": values{"binDir": "bin"}}, "binDir"},
		{values{"node": values{"binDir": "/usr/local bin"}}, "binDir"},
		{values{"image": values{"pullPolicy": "Sometimes"}}, "pullPolicy"},
		{values{"image": values{"tag": "@sha256:" + strings.Repeat("0a", 32)}}, "tag"},
		{values{"image": values{"tag": "v1.2.3@sha256:0a"}}, "tag"},
		{values{"supernodes": []any{"10.0.0.5:7700"}}, "supernodes"},
		{values{"uninstall": values{"timeout": "soon"}}, "timeout"},
		{values{"supernodes": []any{id + "@10.0.0.5:7700"}}, "supernode.enabled"},
		{values{"supernode": values{"enabled": false}}, "token.existingSecret"},
		{values{"supernode": values{"replicas": 2, "addresses": []any{"10.0.0.5:7700"}}}, "supernode.addresses"},
	} {
		if _, err := render(t, c.values); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: %v", c.values, err)
		}
	}
}

// TestUninstallTimeout: Helm waits longer than the Job that it starts, with the command of
// the page.
func TestUninstallTimeout(t *testing.T) {
	page, err := os.ReadFile(docs)
	if err != nil {
		t.Fatal(err)
	}
	commands := regexp.MustCompile(`(?m)^    helm uninstall .*`).FindAllString(string(page), -1)
	if len(commands) == 0 {
		t.Fatal("the page has no helm uninstall")
	}
	objects, err := render(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	args := find[*batchv1.Job](t, objects, "shoal-uninstall").Spec.Template.Spec.Containers[0].Args
	job := duration(t, regexp.MustCompile(`--timeout=(\S+)`), strings.Join(args, " "))
	for _, command := range commands {
		if helm := duration(t, regexp.MustCompile(`--timeout (\S+)`), command); helm <= job {
			t.Errorf("Helm waits for %v with %q, and the Job for %v", helm, command, job)
		}
	}
}

// duration is the one that a flag has in text; 0: the flag is not there.
func duration(t *testing.T, flag *regexp.Regexp, text string) time.Duration {
	t.Helper()
	m := flag.FindStringSubmatch(text)
	if m == nil {
		return 0
	}
	d, err := time.ParseDuration(m[1])
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestUninstallTolerations: the Jobs of helm uninstall run on a machine that is tainted for
// other pods, and not on one that is away or cordoned.
func TestUninstallTolerations(t *testing.T) {
	more := values{"key": "dedicated", "operator": "Equal", "value": "batch", "effect": "NoSchedule"}
	objects, err := render(t, values{"uninstall": values{"tolerations": []any{more}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"shoal-uninstall", "shoal-forget"} {
		keys := map[string]bool{}
		for _, tol := range find[*batchv1.Job](t, objects, name).Spec.Template.Spec.Tolerations {
			keys[tol.Key] = true
			// No key is each key; those of node.kubernetes.io say what is wrong with a machine.
			if tol.Key == "" || strings.HasPrefix(tol.Key, "node.kubernetes.io/") {
				t.Errorf("%s tolerates %v", name, tol)
			}
		}
		for _, key := range []string{"shoal.dev/not-ready", "node-role.kubernetes.io/control-plane", "CriticalAddonsOnly", "dedicated"} {
			if !keys[key] {
				t.Errorf("%s does not tolerate %s", name, key)
			}
		}
	}
}

// TestAlerts: rules ask only for metrics that docs/metrics.md has, which is generated from
// the program.
func TestAlerts(t *testing.T) {
	rules, err := os.ReadFile(filepath.Join(chart, "alerts.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	metrics, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`shoal_[a-z_]+`).FindAllString(string(rules), -1)
	if len(names) == 0 {
		t.Error("no rule asks for a metric")
	}
	for _, name := range names {
		if !bytes.Contains(metrics, []byte("| `"+name+"` |")) {
			t.Errorf("shoal has no metric %s", name)
		}
	}
}

// TestSELinux: a container that asks the node on its machine is of a type that may connect to
// a process of the machine. Privileged ones may.
func TestSELinux(t *testing.T) {
	objects, err := render(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"prefetch-job.yaml", "prefetch-daemonset.yaml"} {
		text, err := os.ReadFile(filepath.Join("../examples", name))
		if err != nil {
			t.Fatal(err)
		}
		objects = append(objects, decode(t, name, text))
	}
	found := 0
	for _, o := range objects {
		var spec corev1.PodSpec
		switch o := o.(type) {
		case *appsv1.DaemonSet:
			spec = o.Spec.Template.Spec
		case *batchv1.Job:
			spec = o.Spec.Template.Spec
		}
		for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
			for _, m := range c.VolumeMounts {
				if m.MountPath != "/run/shoal" {
					continue
				}
				found++
				if s := c.SecurityContext.SELinuxOptions; s == nil || s.Type != "spc_t" {
					t.Errorf("%T: %s has the SELinux options %v", o, c.Name, s)
				}
			}
		}
	}
	if found != 3 {
		t.Errorf("%d containers ask the node", found)
	}
}

// TestQuota: each priority of the pods is one that the quota of the namespace has.
func TestQuota(t *testing.T) {
	objects, err := render(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	quota := find[*corev1.ResourceQuota](t, objects, "shoal-critical-pods")
	terms := quota.Spec.ScopeSelector.MatchExpressions
	if len(terms) != 1 || terms[0].ScopeName != corev1.ResourceQuotaScopePriorityClass || terms[0].Operator != corev1.ScopeSelectorOpIn {
		t.Fatalf("the quota is %+v", terms)
	}
	for _, class := range []string{
		find[*appsv1.DaemonSet](t, objects, "shoal-node").Spec.Template.Spec.PriorityClassName,
		find[*appsv1.StatefulSet](t, objects, "shoal-supernode").Spec.Template.Spec.PriorityClassName,
	} {
		if !slices.Contains(terms[0].Values, class) {
			t.Errorf("the quota is for %v, and a pod has %s", terms[0].Values, class)
		}
	}
}

// TestUninstallSelector: the Jobs of helm uninstall look at the pods of the DaemonSet, and at
// none of another chart that is installed with this one, whatever its components are called.
func TestUninstallSelector(t *testing.T) {
	objects, err := render(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	own := labels.Set(find[*appsv1.DaemonSet](t, objects, "shoal-node").Spec.Template.Labels)
	other := labels.Merge(own, labels.Set{"app.kubernetes.io/name": "csi-driver"})
	for _, name := range []string{"shoal-uninstall", "shoal-forget"} {
		args := strings.Join(find[*batchv1.Job](t, objects, name).Spec.Template.Spec.Containers[0].Args, "\n")
		m := regexp.MustCompile(`(?m)^--selector=(.*)$`).FindStringSubmatch(args)
		if m == nil {
			t.Fatalf("%s has no selector:\n%s", name, args)
		}
		s, err := labels.Parse(m[1])
		if err != nil || !s.Matches(own) || s.Matches(other) {
			t.Errorf("%s selects %s, %v", name, m[1], err)
		}
	}
}

// TestMonitors: Prometheus gets one target for each pod. With the name of a port, it takes
// the address of the pod with this port, whatever its family is; without one, it makes a
// target of each container.
func TestMonitors(t *testing.T) {
	objects, err := render(t, cases["all of it"])
	if err != nil {
		t.Fatal(err)
	}
	node := find[*appsv1.DaemonSet](t, objects, "shoal-node").Spec.Template
	super := find[*appsv1.StatefulSet](t, objects, "shoal-supernode").Spec.Template
	monitors := 0
	for _, o := range objects {
		u, ok := o.(*unstructured.Unstructured)
		if !ok || u.GetKind() == "PrometheusRule" {
			continue
		}
		monitors++
		pod, list := node, "podMetricsEndpoints"
		if u.GetKind() == "ServiceMonitor" {
			pod, list = super, "endpoints"
		}
		selector, _, _ := unstructured.NestedStringMap(u.Object, "spec", "selector", "matchLabels")
		selects(t, selector, pod.Labels)
		endpoints, _, _ := unstructured.NestedSlice(u.Object, "spec", list)
		if len(endpoints) != 1 || len(selector) == 0 {
			t.Fatalf("%s: %v", u.GetKind(), u.Object)
		}
		endpoint := endpoints[0].(values)
		port, _ := endpoint["port"].(string)
		containers := 0
		for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
			for _, p := range c.Ports {
				if port != "" && p.Name == port {
					containers++
				}
			}
		}
		if containers != 1 {
			t.Errorf("%s: %d containers have the port %q", u.GetKind(), containers, port)
		}
		if strings.Contains(fmt.Sprint(endpoint), "__address__") {
			t.Errorf("%s makes addresses itself: %v", u.GetKind(), endpoint)
		}
	}
	if monitors != 2 {
		t.Errorf("%d monitors", monitors)
	}
	if ports, config := node.Spec.Containers[0].Ports, find[*corev1.ConfigMap](t, objects, "shoal-node").Data["node.toml"]; len(ports) != 1 || !strings.Contains(config, fmt.Sprintf("metrics_address = \":%d\"\n", ports[0].ContainerPort)) {
		t.Errorf("ports %v, and the nodes have\n%s", ports, config)
	}
	// A port of a pod on the machine's network is one that no other pod there may have.
	objects, err = render(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c := find[*appsv1.DaemonSet](t, objects, "shoal-node").Spec.Template.Spec.Containers[0]; len(c.Ports) > 0 {
		t.Errorf("the pods on the nodes have the ports %v without monitoring", c.Ports)
	}
}

// TestDocsValues: the table of values in docs/kubernetes.md is what values.yaml says.
func TestDocsValues(t *testing.T) {
	b, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	want := "| value | default | |\n|---|---|---|\n" + rows(t, "", doc.Content[0])
	page, err := os.ReadFile(docs)
	if err != nil {
		t.Fatal(err)
	}
	const from, to = "<!-- values of the chart -->\n", "<!-- end of values of the chart -->\n"
	before, rest, ok := strings.Cut(string(page), from)
	got, after, ok2 := strings.Cut(rest, to)
	switch {
	case !ok || !ok2:
		t.Fatalf("%s has no %q with its end", docs, strings.TrimSpace(from))
	case got == want:
	case *update:
		if err := os.WriteFile(docs, []byte(before+from+want+to+after), 0o644); err != nil { //nolint:gosec // a page
			t.Fatal(err)
		}
	default:
		t.Errorf("the table of values is not that of values.yaml (go test -run TestDocsValues -update writes it):\n%s\nwant\n%s", got, want)
	}
}

// rows are those of the values in n: each value that has a comment.
func rows(t *testing.T, prefix string, n *yaml.Node) string {
	t.Helper()
	out := ""
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		name := prefix + key.Value
		_, text, ok := strings.Cut(key.HeadComment, "# -- ")
		switch {
		case ok:
			value.Style = yaml.FlowStyle
			text = strings.ReplaceAll(text, "\n# ", " ")
			b, err := yaml.Marshal(flow(value))
			if err != nil {
				t.Fatal(err)
			}
			out += fmt.Sprintf("| `%s` | `%s` | %s |\n", name, strings.TrimSpace(string(b)), text)
		case value.Kind == yaml.MappingNode && len(value.Content) > 0:
			out += rows(t, name+".", value)
		default:
			t.Errorf("values.yaml: %s has no comment", name)
		}
	}
	return out
}

// flow is the node in one line, without comments.
func flow(n *yaml.Node) *yaml.Node {
	c := *n
	c.HeadComment, c.LineComment, c.FootComment = "", "", ""
	c.Content = nil
	for _, child := range n.Content {
		c.Content = append(c.Content, flow(child))
	}
	return &c
}
