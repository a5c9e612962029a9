package daemon

import "testing"

func TestNormalize(t *testing.T) {
	for in, want := range map[string]string{
		"redis":                   "docker.io/library/redis:latest",
		"redis:7":                 "docker.io/library/redis:7",
		"user/app":                "docker.io/user/app:latest",
		"localhost:5000/a/b:v1":   "localhost:5000/a/b:v1",
		"r.example.com/app:v2":    "r.example.com/app:v2",
		"UPPER CASE":              "",
		"":                        "",
		"https://docker.io/redis": "",
	} {
		got, err := Normalize(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q is %q, %v; want %q", in, got, err, want)
		}
	}
}
