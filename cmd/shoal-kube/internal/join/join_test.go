package join

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// store has Secrets as the API does: an update of what has changed since is refused.
// TestChart in integration/kubernetes does the same with a real API.
type store struct {
	secrets map[string]*corev1.Secret
	version int
	// before is called before each update, once.
	before func()
}

func newStore(names ...string) *store {
	s := &store{secrets: map[string]*corev1.Secret{}}
	for _, name := range names {
		s.secrets[name] = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: "0"}}
	}
	return s
}

var resource = schema.GroupResource{Resource: "secrets"}

func (s *store) Get(_ context.Context, name string, _ metav1.GetOptions) (*corev1.Secret, error) {
	if secret := s.secrets[name]; secret != nil {
		return secret.DeepCopy(), nil
	}
	return nil, apierrors.NewNotFound(resource, name)
}

func (s *store) Update(_ context.Context, secret *corev1.Secret, _ metav1.UpdateOptions) (*corev1.Secret, error) {
	if f := s.before; f != nil {
		s.before = nil
		f()
	}
	if s.secrets[secret.Name].ResourceVersion != secret.ResourceVersion {
		return nil, apierrors.NewConflict(resource, secret.Name, errors.New("changed"))
	}
	s.version++
	secret = secret.DeepCopy()
	secret.ResourceVersion = strings.Repeat("i", s.version)
	s.secrets[secret.Name] = secret
	return secret, nil
}

var addresses = []string{"10.96.0.7:7700", "[2001:db8::7]:7700"}

// TestFill: supernodes that start in any order, and again, agree.
func TestFill(t *testing.T) {
	ctx := t.Context()
	s := newStore("keys", "join")
	two := Values{Revision: "r", Addresses: addresses}
	var other Info
	var otherKey []byte
	// The other supernode is quicker.
	s.before = func() {
		var err error
		if otherKey, other, err = Fill(ctx, s, "keys", "join", two, 1, nil); err != nil {
			t.Fatal(err)
		}
	}
	key, info, err := Fill(ctx, s, "keys", "join", two, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	if info.Token == "" || info.Token != other.Token || !slices.Equal(info.Supernodes, other.Supernodes) || string(key) == string(otherKey) {
		t.Errorf("%v, %v", info, other)
	}
	for i, a := range info.Supernodes {
		if id, at, _ := strings.Cut(a, "@"); !strings.HasPrefix(id, "12D3KooW") || at != addresses[i] {
			t.Errorf("supernode %d is %s", i, a)
		}
	}
	version := s.version
	again, same, err := Fill(ctx, s, "keys", "join", two, 0, nil)
	if err != nil || string(again) != string(key) || same.Token != info.Token || s.version != version {
		t.Errorf("another start changes something: %v, %v", same, err)
	}
	read, err := Read(ctx, s, "join", "r", func(err error) { t.Error(err) })
	if err != nil || read.Token != info.Token || !slices.Equal(read.Supernodes, info.Supernodes) {
		t.Errorf("%v, %v", read, err)
	}
	if _, _, err := Fill(ctx, s, "keys", "join", two, 2, nil); err == nil {
		t.Error("a third one of two")
	}
	if _, _, err := Fill(ctx, s, "keys", "other", two, 0, nil); !apierrors.IsNotFound(err) {
		t.Errorf("no Secret: %v", err)
	}
}

// TestKeysStay: a supernode keeps the key on its disk if the Secret has none; else that of
// the Secret counts. A token of the operator's counts always.
func TestKeysStay(t *testing.T) {
	ctx := t.Context()
	own := []byte(identity)
	s := newStore("keys", "join")
	if key, _, err := Fill(ctx, s, "keys", "join", Values{Addresses: addresses[:1]}, 0, own); err != nil || string(key) != string(own) {
		t.Errorf("the key on the disk is not used: %v", err)
	}
	other, err := makeKey()
	if err != nil {
		t.Fatal(err)
	}
	if key, info, err := Fill(ctx, s, "keys", "join", Values{Addresses: addresses[:1], Token: "mine"}, 0, other); err != nil || string(key) != string(own) || info.Token != "mine" {
		t.Errorf("the key of the Secret is not used: %v, %v", info, err)
	}
}

// identity is what a supernode has made, and id what it has printed.
const (
	identity = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIF/iJ1y79Gl0nmv7PXDzQyHu5212RYl0pTWOgukyx3+y\n-----END PRIVATE KEY-----\n"
	id       = "12D3KooWQkWMo1s2pzL4qhUDDX2NPUiEHmbq5Zj2WC8hDmQE68ge"
)

// TestID: the ID is the one that a supernode with this key has.
func TestID(t *testing.T) {
	if got, err := ID([]byte(identity)); err != nil || got != id {
		t.Errorf("%s, %v; the supernode says %s", got, err, id)
	}
	for _, bad := range []string{"", "x", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"} {
		if _, err := ID([]byte(bad)); err == nil {
			t.Errorf("%q has an ID", bad)
		}
	}
}

// TestReadWaits: a machine that is sooner than the supernodes says what it waits for. An
// upgrade is such a case, too: then the Secret has as many addresses, and a token, and none
// of them is right. The values that count again after a rollback are waited for likewise.
func TestReadWaits(t *testing.T) {
	s := newStore("keys", "join")
	var want Info
	read := func(revision string) (Info, error) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		return Read(ctx, s, "join", revision, func(error) { cancel() })
	}
	fill := func(v Values) {
		t.Helper()
		var err error
		if _, want, err = Fill(t.Context(), s, "keys", "join", v, 0, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := read("a"); err == nil || !strings.Contains(err.Error(), "no token and no addresses yet") {
		t.Errorf("empty: %v", err)
	}
	values := map[string]Values{
		"a": {Revision: "a", Addresses: addresses[:1], Token: "old"},
		"b": {Revision: "b", Addresses: addresses[1:], Token: "new"},
	}
	for _, revision := range []string{"a", "b", "a"} {
		if want.Token != "" {
			if info, err := read(revision); err == nil || !strings.Contains(err.Error(), "of other values") {
				t.Errorf("%s is not there, and %v is read, %v", revision, info, err)
			}
		}
		fill(values[revision])
		if info, err := read(revision); err != nil || info.Token != values[revision].Token || !slices.Equal(info.Supernodes, want.Supernodes) {
			t.Errorf("%s: %v, %v", revision, info, err)
		}
	}
}

// TestCompose: keys of the chart count, those of the operator stay.
func TestCompose(t *testing.T) {
	got, err := Compose("zone = \"here\"\n[images]\nnever = [\"a\"]\n", map[string]any{"version": 1, "supernodes": []string{"x"}}, map[string]any{"zone": "there", "rack": "r"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"version = 1", "zone = 'here'", "rack = 'r'", "supernodes = ['x']", "[images]", "never = ['a']"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
	for _, bad := range []string{"supernodes = []", "zone = "} {
		if got, err := Compose(bad, map[string]any{"supernodes": []string{"x"}}, nil); err == nil {
			t.Errorf("%q gives %q", bad, got)
		}
	}
}
