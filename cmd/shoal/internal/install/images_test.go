package install

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
)

// TestSilent: a containerd that accepts connections and says nothing, and one that takes
// questions and does not answer, do not hold an uninstallation, and the error says what to
// do.
func TestSilent(t *testing.T) {
	listen := func(name string) (net.Listener, string) {
		socket := filepath.Join(t.TempDir(), name)
		l, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		return l, socket
	}
	_, mute := listen("mute.sock")
	l, hung := listen("hung.sock")
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
		<-t.Context().Done() // the deadline of the call does not end it, either
		return nil
	}))
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)

	const limit = 100 * time.Millisecond
	asks := map[string]func(ctx context.Context, socket string) error{
		"Users": func(ctx context.Context, socket string) error {
			_, err := users(ctx, limit, socket, "shoal")
			return err
		},
		"MoveImages": func(ctx context.Context, socket string) error {
			return moveImages(ctx, limit, socket, "shoal", "overlayfs", nil, nil)
		},
	}
	for name, ask := range asks {
		for _, socket := range []string{mute, hung} {
			// Far more than the limit: if this is over, then there is none.
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			err := ask(ctx, socket)
			if ctx.Err() != nil {
				t.Errorf("%s of %s waits without limit", name, socket)
			}
			cancel()
			if !errors.Is(err, ErrSilent) {
				t.Errorf("%s of %s: %v", name, socket, err)
				continue
			}
			for _, part := range []string{socket, "did not answer within 100ms", "Restart containerd"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%s of %s does not say %q: %v", name, socket, part, err)
				}
			}
		}
	}
}
