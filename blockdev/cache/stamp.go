package cache

import (
	"os"
	"sync/atomic"
	"time"
)

// scrubFile says by its modification time when everything was last checked.
const scrubFile = "scrubbed"

// stamp is a time that an empty file keeps.
type stamp struct {
	path string
	at   atomic.Int64 // Unix nanoseconds; 0: the file was not there
}

func newStamp(path string) *stamp {
	s := &stamp{path: path}
	if st, err := os.Stat(path); err == nil {
		s.at.Store(st.ModTime().UnixNano())
	}
	return s
}

// now is for all that was checked just now. If it cannot be written down, it is done
// again.
func (s *stamp) now() {
	now := time.Now()
	s.at.Store(now.UnixNano())
	f, err := os.OpenFile(s.path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return
	}
	_ = f.Close()
	_ = os.Chtimes(s.path, now, now)
}
