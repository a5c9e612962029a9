// Package config reads and checks the files of `shoal node` and `shoal
// supernode`: TOML, few keys, a default for each. An unknown key, a value that
// cannot be, or two that clash, are errors that say what to change; nothing is
// skipped silently.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/pelletier/go-toml/v2"
)

// Version is the version of both files. Another one is refused.
const Version = 1

// Duration is a time.Duration that is written as "30s" or "5m".
type Duration time.Duration

// UnmarshalText reads what time.ParseDuration reads.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is not a duration such as \"30s\" or \"5m\"", b)
	}
	*d = Duration(v)
	return nil
}

// MarshalText writes the form that UnmarshalText reads.
func (d Duration) MarshalText() ([]byte, error) {
	s := time.Duration(d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return []byte(s), nil
}

// Size is a number of bytes that is written as "100GiB".
type Size int64

// UnmarshalText reads a number with a binary unit: "512MiB", "100GiB", "2TiB".
func (s *Size) UnmarshalText(b []byte) error {
	v, err := units.RAMInBytes(string(b))
	if err != nil || v < 0 {
		return fmt.Errorf("%q is not a size such as \"512MiB\" or \"100GiB\"", b)
	}
	*s = Size(v)
	return nil
}

// MarshalText writes the form that UnmarshalText reads, and the same number:
// with the largest unit that leaves no rest.
func (s Size) MarshalText() ([]byte, error) {
	v, unit := int64(s), "B"
	for _, u := range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		if v == 0 || v%1024 != 0 {
			break
		}
		v, unit = v/1024, u
	}
	return fmt.Appendf(nil, "%d%s", v, unit), nil
}

// Log says what is logged, and how, to standard error.
type Log struct {
	Level  slog.Level `toml:"level" comment:"debug, info, warn or error"`
	Format string     `toml:"format" comment:"text or json"`
}

func (l Log) check() error {
	if l.Format != "text" && l.Format != "json" {
		return fmt.Errorf("log.format is %q: it must be text or json", l.Format)
	}
	return nil
}

// Load reads the file at path over the defaults in c, which is a *Node or a
// *Supernode, and checks the result.
func Load(path string, c interface{ Check() error }) error {
	b, err := os.ReadFile(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("config file %s is not there: write one with `shoal config default`", path)
		}
		return fmt.Errorf("config file: %w", err)
	}
	dec := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields()
	if err := dec.Decode(c); err != nil {
		return fmt.Errorf("config file %s: %w", path, explain(err))
	}
	if err := c.Check(); err != nil {
		return fmt.Errorf("config file %s: %w", path, err)
	}
	return nil
}

// explain turns the decoder's errors into ones that name the key and the line.
func explain(err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		var errs []error
		for i := range strict.Errors {
			line, _ := strict.Errors[i].Position()
			errs = append(errs, fmt.Errorf("line %d: unknown key %q", line, strings.Join(strict.Errors[i].Key(), ".")))
		}
		return errors.Join(errs...)
	}
	var dec *toml.DecodeError
	if errors.As(err, &dec) {
		line, _ := dec.Position()
		return fmt.Errorf("line %d: %s: %w", line, strings.Join(dec.Key(), "."), err)
	}
	return err
}

// Write returns c as a TOML file with comments, such as Load reads.
func Write(c any) ([]byte, error) {
	var b bytes.Buffer
	if err := toml.NewEncoder(&b).Encode(c); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

func checkVersion(v int) error {
	if v != Version {
		return fmt.Errorf("version is %d: this shoal reads version %d", v, Version)
	}
	return nil
}

func atLeast(key string, v, least Duration) error {
	if v < least {
		return fmt.Errorf("%s is %v: it must be at least %v", key, time.Duration(v), time.Duration(least))
	}
	return nil
}
