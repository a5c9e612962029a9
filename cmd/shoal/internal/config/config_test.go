package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/shoalfs/shoal/snapshotter/policy"
)

const someID = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestDefaults: what `shoal config default` prints reads back as the same values.
func TestDefaults(t *testing.T) {
	for name, c := range map[string]struct{ want, empty interface{ Check() error } }{
		"node":      {DefaultNode(), &Node{Images: Images{Prefetch: map[string]policy.Mode{}}}}, // reading an empty table makes no map
		"supernode": {DefaultSupernode(), &Supernode{}},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.want.Check(); err != nil {
				t.Errorf("the defaults do not check: %v", err)
			}
			b, err := Write(c.want)
			if err != nil {
				t.Fatal(err)
			}
			if err := Load(writeFile(t, string(b)), c.empty); err != nil {
				t.Fatalf("%v\n%s", err, b)
			}
			if !reflect.DeepEqual(c.empty, c.want) {
				t.Errorf("read back as %+v, want %+v\n%s", c.empty, c.want, b)
			}
		})
	}
}

// TestKept: keys that a file does not name keep their defaults.
func TestKept(t *testing.T) {
	c := DefaultNode()
	err := Load(writeFile(t, `
version = 1
supernodes = ["`+someID+`@cache.example.com:7700"]
read_timeout = "90s"
[log]
level = "debug"
`), c)
	if err != nil {
		t.Fatal(err)
	}
	want := DefaultNode()
	want.Supernodes = []string{someID + "@cache.example.com:7700"}
	want.ReadTimeout = Duration(90 * time.Second)
	want.Log.Level = -4
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got %+v, want %+v", c, want)
	}
}

// TestImages: rules for images are read, written and read again.
func TestImages(t *testing.T) {
	c := DefaultNode()
	err := Load(writeFile(t, `
prefetch = "startup"
[images]
never = ["quay.io/db/*"]
[images.prefetch]
"quay.io/*" = "all"
redis = "none"
`), c)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Write(c)
	if err != nil {
		t.Fatal(err)
	}
	back := DefaultNode()
	if err := Load(writeFile(t, string(b)), back); err != nil || !reflect.DeepEqual(back, c) {
		t.Fatalf("read back as %+v, %v; want %+v\n%s", back, err, c, b)
	}
	p, err := back.Policy()
	if err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]policy.Mode{"quay.io/x:1": policy.All, "redis:7": policy.None, "nginx": policy.Startup} {
		if got := p.Prefetch(ref); got != want || !p.Lazy(ref) {
			t.Errorf("%s: %s, want %s", ref, got, want)
		}
	}
	if p.Lazy("quay.io/db/x:1") {
		t.Error("images.never is not heeded")
	}
}

// TestRefused: each wrong value gives an error that names its key.
func TestRefused(t *testing.T) {
	addr := `"` + someID + `@10.0.0.1:7700"`
	long := `"/` + strings.Repeat("x", maxSocket) + `"`
	both := map[string]struct{ file, want string }{
		"other version":         {`version = 2`, "version is 2"},
		"relative root":         {`root = "data"`, "root"},
		"empty root":            {`root = ""`, "root"},
		"relative socket":       {`control_address = "x.sock"`, "control_address"},
		"long socket":           {`control_address = ` + long, "control_address"},
		"metrics without port":  {`metrics_address = "127.0.0.1"`, "metrics_address"},
		"metrics with name":     {`metrics_address = "127.0.0.1:http"`, "metrics_address"},
		"metrics port too high": {`metrics_address = "127.0.0.1:65536"`, "metrics_address"},
		"unknown level":         {"[log]\nlevel = \"loud\"", "log.level"},
		"unknown format":        {"[log]\nformat = \"xml\"", "log.format"},
		"unknown key":           {`rooot = "/x"`, `"rooot"`},
		"unknown nested key":    {"[log]\ncolour = true", `"log.colour"`},
		"unknown section":       {"[cache]\nsize = 1", "cache"},
		"wrong type":            {`root = 7`, "root"},
		"no TOML":               {`root`, "line 1"},
	}
	roles := map[string]map[string]struct{ file, want string }{
		"node": {
			"relative address":         {`address = "x.sock"`, "address"},
			"long address":             {`address = ` + long, "address"},
			"one socket for two":       {"address = \"/a\"\ncontrol_address = \"/a\"", "address and control_address"},
			"relative docker":          {`docker_config = "config.json"`, "docker_config"},
			"no way to mount":          {`mount = "direct"`, `mount is "direct": it must be "file" or "loop"`},
			"no duration":              {`read_timeout = "soon"`, "read_timeout"},
			"duration without unit":    {`read_timeout = "30"`, "read_timeout"},
			"number for duration":      {`read_timeout = 30`, "read_timeout"},
			"negative duration":        {`read_timeout = "-5s"`, "read_timeout"},
			"short duration":           {`index_timeout = "10ms"`, "index_timeout"},
			"address without ID":       {`supernodes = ["10.0.0.1:7700"]`, "supernodes"},
			"address without port":     {`supernodes = ["` + someID + `@10.0.0.1"]`, "supernodes"},
			"the same supernode twice": {`supernodes = [` + addr + `, ` + addr + `]`, "twice"},
			"unknown mode":             {`prefetch = "some"`, `prefetch is "some"`},
			"bad pattern":              {"[images]\nnever = [\"https://quay.io/*\"]", `images.never: "https://quay.io/*"`},
			"pattern of a registry":    {"[images]\nlazy = [\"quay.io\"]", `images.lazy: "quay.io"`},
			"bad eager pattern":        {"[images]\neager = [\"quay.io/Base\"]", "images.eager"},
			"bad mode of a pattern":    {"[images.prefetch]\n\"quay.io/*\" = \"never\"", `images.prefetch: the mode of "quay.io/*"`},
			"two modes for one":        {"[images.prefetch]\nredis = \"all\"\n\"docker.io/library/redis\" = \"none\"", "name the same images"},
			"unknown list":             {"[images]\nalways = []", `"images.always"`},
			"embedded and not":         {"supernodes = [" + addr + "]\n[embedded.store]\nquota = \"7GiB\"", "supernodes and embedded"},
			"small quota":              {"[embedded.store]\nquota = \"10MiB\"", "embedded.store.quota"},
			"relative hosts":           {"[embedded.registry]\nconfig_path = \"certs.d\"", "embedded.registry.config_path"},
			"URL for host":             {"[embedded.registry]\ntrusted = [\"https://docker.io\"]", "embedded.registry.trusted"},
		},
		"supernode": {
			"nowhere to listen": {`listen = []`, "listen"},
			"listen on no port": {`listen = ["0.0.0.0"]`, "listen"},
			"no size":           {"[store]\nquota = \"much\"", "store.quota"},
			"negative size":     {"[store]\nquota = \"-1GiB\"", "store.quota"},
			"small quota":       {"[store]\nquota = \"1023MiB\"", "store.quota"},
			"number for size":   {"[store]\nquota = 100", "store.quota"},
			"slow upload":       {`max_upload = "64KiB"`, "max_upload is 64KiB: it must be at least 1MiB"},
			"slow download":     {"[registry]\nmax_download = \"1023KiB\"", "registry.max_download"},
			"no ingests":        {"[registry]\ningests = 0", "registry.ingests"},
			"too many ingests":  {"[registry]\ningests = 257", "registry.ingests"},
			"no peers":          {`max_peers = 0`, "max_peers"},
			"relative hosts":    {"[registry]\nconfig_path = \"certs.d\"", "registry.config_path"},
			"empty host":        {"[registry]\ntrusted = [\"\"]", "registry.trusted"},
			"allowed tag":       {"[registry]\nallowed = [\"quay.io/x:1\"]", "registry.allowed"},
			"allowed host":      {"[registry]\nallowed = [\"quay.io\"]", `registry.allowed: "quay.io"`},
			"no time at all":    {"[registry]\naccess_ttl = \"0s\"", "registry.access_ttl"},
			"grace below TTL":   {"[registry]\naccess_ttl = \"2h\"\naccess_grace = \"1h\"", "registry.access_grace"},
		},
	}
	for role, own := range roles {
		for _, cases := range []map[string]struct{ file, want string }{both, own} {
			for name, tt := range cases {
				t.Run(role+"/"+name, func(t *testing.T) {
					var c interface{ Check() error } = DefaultNode()
					if role == "supernode" {
						c = DefaultSupernode()
					}
					path := writeFile(t, tt.file)
					err := Load(path, c)
					if err == nil {
						t.Fatal("no error")
					}
					if s := err.Error(); !strings.Contains(s, path) || !strings.Contains(strings.ReplaceAll(s, path, ""), tt.want) {
						t.Errorf("%q does not name the file, or not %q", s, tt.want)
					}
				})
			}
		}
	}
}

// TestAll: several mistakes are said at once.
func TestAll(t *testing.T) {
	err := Load(writeFile(t, "root = \"x\"\nread_timeout = \"1ms\"\n[log]\nformat = \"xml\""), DefaultNode())
	for _, key := range []string{"root", "read_timeout", "log.format"} {
		if err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%v does not name %s", err, key)
		}
	}
	err = Load(writeFile(t, "\none = 1\n\ntwo = 2"), DefaultNode())
	for _, want := range []string{"line 2", `"one"`, "line 4", `"two"`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not say %s", err, want)
		}
	}
}

func TestNoFile(t *testing.T) {
	err := Load(filepath.Join(t.TempDir(), "none.toml"), DefaultNode())
	if err == nil || !strings.Contains(err.Error(), "shoal config default") {
		t.Errorf("%v does not say what to do", err)
	}
	if err := Load(t.TempDir(), DefaultNode()); err == nil {
		t.Error("a directory was read as a file")
	}
}

func TestDuration(t *testing.T) {
	for d, text := range map[time.Duration]string{
		0:                              "0s",
		time.Second:                    "1s",
		90 * time.Second:               "1m30s",
		10 * time.Minute:               "10m",
		time.Hour:                      "1h",
		20 * time.Hour:                 "20h",
		70 * time.Minute:               "1h10m",
		time.Hour + time.Second:        "1h0m1s",
		1500 * time.Millisecond:        "1.5s",
		-5 * time.Minute:               "-5m",
		time.Duration(1<<63 - 1):       "2562047h47m16.854775807s",
		24*time.Hour + 100*time.Minute: "25h40m",
	} {
		b, err := Duration(d).MarshalText()
		if err != nil || string(b) != text {
			t.Errorf("%v is written as %q, %v; want %q", d, b, err, text)
		}
		var back Duration
		if err := back.UnmarshalText(b); err != nil || time.Duration(back) != d {
			t.Errorf("%q is read as %v, %v; want %v", b, time.Duration(back), err, d)
		}
	}
	for _, text := range []string{"", "30", "soon", "5 minutes", "1d"} {
		d := Duration(7)
		if err := d.UnmarshalText([]byte(text)); err == nil || d != 7 {
			t.Errorf("%q is read as %v, %v", text, time.Duration(d), err)
		}
	}
}

func TestSize(t *testing.T) {
	for s, text := range map[Size]string{
		0:          "0B",
		1:          "1B",
		1023:       "1023B",
		1 << 10:    "1KiB",
		1536:       "1536B",
		100 << 30:  "100GiB",
		1536 << 20: "1536MiB",
		1<<40 + 1:  "1099511627777B",
		3 << 50:    "3PiB",
	} {
		b, err := s.MarshalText()
		if err != nil || string(b) != text {
			t.Errorf("%d is written as %q, %v; want %q", s, b, err, text)
		}
		var back Size
		if err := back.UnmarshalText(b); err != nil || back != s {
			t.Errorf("%q is read as %d, %v; want %d", b, back, err, s)
		}
	}
	for text, want := range map[string]Size{"1.5GiB": 3 << 29, "1g": 1 << 30, "4096": 4096, "2 TiB": 2 << 40} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%q is read as %d, %v; want %d", text, s, err, want)
		}
	}
	for _, text := range []string{"", "much", "-1GiB", "1XiB", "GiB"} {
		s := Size(7)
		if err := s.UnmarshalText([]byte(text)); err == nil || s != 7 {
			t.Errorf("%q is read as %d, %v", text, s, err)
		}
	}
}
