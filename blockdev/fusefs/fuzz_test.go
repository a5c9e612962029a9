package fusefs

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"testing"
)

// FuzzRequest has a Server handle any bytes as a request, which may say anything
// but must not bring it down.
func FuzzRequest(f *testing.F) {
	for op := range uint32(54) {
		b := make([]byte, 120)
		binary.NativeEndian.PutUint32(b, uint32(len(b)))
		binary.NativeEndian.PutUint32(b[4:], op)
		binary.NativeEndian.PutUint64(b[8:], 7)
		binary.NativeEndian.PutUint64(b[16:], nodeID(idA))
		binary.NativeEndian.PutUint64(b[40:], handle(idA))
		binary.NativeEndian.PutUint32(b[56:], 4096)
		f.Add(b)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = null.Close() })
	files := &memFiles{}
	files.put(idA, onDisk(f, 1, 1<<20))
	f.Fuzz(func(t *testing.T, req []byte) {
		if len(req) > minReadBuffer {
			return
		}
		s, err := New(null, files, Options{Loops: 1})
		if err != nil {
			t.Fatal(err)
		}
		w := newWorker(s)
		defer w.close()
		w.handle(context.Background(), req)
		s.slow.stop()
	})
}

// FuzzInit adopts a connection with any bytes for what was kept of it.
func FuzzInit(f *testing.F) {
	f.Add(kept(0))
	f.Add(kept(1<<63 | 1))
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = null.Close() })
	f.Fuzz(func(t *testing.T, init []byte) {
		s, err := New(null, &memFiles{}, Options{Init: init})
		if err != nil || len(init) == 0 {
			return
		}
		if again, err := s.Init(t.Context()); err != nil || !bytes.Equal(again, init) {
			t.Errorf("kept %x, %v; want %x", again, err, init)
		}
	})
}
