package policy

import "testing"

func TestLocalHost(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "localhost:5000": true, "LOCALHOST": true, "a.localhost:80": true, "localhost.localdomain": true,
		"127.0.0.1": true, "127.8.9.1:5000": true, "[::1]:5000": true, "[::ffff:127.0.0.1]:5000": true, "0.0.0.0:5000": true,
		"reg:5000": true, "registry": true, "reg.": true,
		"docker.io": false, "10.0.0.1:5000": false, "[2001:db8::1]:5000": false, "reg.test:5000": false, "localhost.example.com": false,
	} {
		if got := LocalHost(host); got != want {
			t.Errorf("%s: %v", host, got)
		}
	}
}
