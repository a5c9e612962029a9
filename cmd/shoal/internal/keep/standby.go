package keep

import (
	"fmt"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalfs/shoal/cmd/shoal/internal/fdstore"
)

// standbyTimeout is how long a standby may take until it waits for its turn.
const standbyTimeout = 10 * time.Second

// standby is a process of the next program that is started while the child still
// serves. It does all that needs nothing of what the child has, and then waits
// (fdstore.Open). So an upgrade does not pause reads for as long as a program takes to
// load. A program that knows nothing of this finds that another process has its files
// open, and ends; it is started again when its turn comes.
type standby struct {
	cmd   *exec.Cmd
	ended <-chan error
	turn  *os.File // this side of the socket
	waits chan bool
	ready bool // it waits
}

// startAhead starts a standby of the next program.
func (k *keeper) startAhead() error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("socketpair: %w", err)
	}
	s := &standby{turn: os.NewFile(uintptr(fds[0]), "turn"), waits: make(chan bool, 1)}
	its := os.NewFile(uintptr(fds[1]), "turn")
	defer its.Close()
	k.mu.Lock()
	s.cmd, s.ended, err = k.spawn(k.next, its)
	k.mu.Unlock()
	if err != nil {
		s.turn.Close()
		return err
	}
	k.standby = s
	go func() {
		_ = s.turn.SetReadDeadline(time.Now().Add(standbyTimeout)) // of a socket: never fails
		n, _ := s.turn.Read(make([]byte, 1))
		s.waits <- n == 1
	}()
	return nil
}

// answer gives one value: whether the standby waits now, or is of no use.
func (s *standby) answer() <-chan bool {
	if s == nil {
		return nil
	}
	return s.waits
}

// takeStandby says to the standby, if there is one, that it is its turn, gives it all that
// is stored, and returns it; nil if the program is to be started. mu is held.
func (k *keeper) takeStandby() *standby {
	s := k.standby
	if s == nil {
		return nil
	}
	names, files := k.all()
	if err := fdstore.GoOn(s.turn, names, files); err != nil {
		k.Log.Warn("the new program ended while it waited for the old one to end; it is started again", "program", k.path, "error", err)
		k.dropStandby()
		return nil
	}
	s.turn.Close()
	k.standby = nil
	return s
}

// dropStandby ends a standby that is not used.
func (k *keeper) dropStandby() {
	s := k.standby
	if s == nil {
		return
	}
	k.standby = nil
	_ = s.cmd.Process.Kill() // it may have ended
	<-s.ended
	s.turn.Close()
}
