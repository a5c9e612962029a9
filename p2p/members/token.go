package members

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/shoalfs/shoal/p2p/wire"
)

// minToken is the length of a token, in bytes, below which it could be guessed.
const minToken = 16

// maxTokenFile bounds a token file, in bytes.
const maxTokenFile = 64 << 10

// ReadTokens reads the tokens in a file, one a line; empty lines and lines that
// begin with # do not count. A file that others than its owner and group may
// read, that has no token, or a token that is too short or too long, is an error
// that says what to do.
func ReadTokens(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("token file: %w", err)
	}
	defer f.Close()
	fail := func(err error) error { return fmt.Errorf("token file %s: %w", path, err) }
	st, err := f.Stat()
	if err != nil {
		return nil, fail(err)
	}
	if perm := st.Mode().Perm(); perm&0o007 != 0 {
		return nil, fail(fmt.Errorf("mode %04o lets every user of this machine read the token: chmod 600 the file", perm))
	}
	b, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	if err != nil {
		return nil, fail(err)
	}
	if len(b) > maxTokenFile {
		return nil, fail(fmt.Errorf("more than %d bytes: this is not a file of tokens", maxTokenFile))
	}
	var tokens []string
	lines := bufio.NewScanner(bytes.NewReader(b))
	lines.Buffer(nil, maxTokenFile+1)
	for n := 1; lines.Scan(); n++ {
		t := strings.TrimSpace(lines.Text())
		switch {
		case t == "" || t[0] == '#':
		case len(t) < minToken:
			return nil, fail(fmt.Errorf("line %d has %d characters: a token has at least %d, such as `openssl rand -hex 32` prints", n, len(t), minToken))
		case len(t) > wire.MaxToken:
			return nil, fail(fmt.Errorf("line %d has %d characters: a token has at most %d", n, len(t), wire.MaxToken))
		default:
			tokens = append(tokens, t)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fail(err)
	}
	if len(tokens) == 0 {
		return nil, fail(errors.New("the file has no token"))
	}
	return tokens, nil
}
