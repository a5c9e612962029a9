// Guest is the program in the images that the lab's pods run: static, and nothing
// else need be in an image with it.
//
//	guest pause          waits for SIGTERM or SIGINT
//	guest cat FILE...    prints files
//	guest sum FILE...    prints the SHA-256 and the name of each
//	guest stat FILE...   prints "uid:gid name" of each
//	guest touch FILE...  makes files, empty ones
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: guest pause|cat|sum|stat|touch [FILE...]")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

func run(what string, names []string) error {
	each := map[string]func(string) error{"cat": cat, "sum": sum, "stat": stat, "touch": touch}[what]
	switch {
	case what == "pause":
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM, syscall.SIGINT)
		<-c
		return nil
	case each == nil:
		return fmt.Errorf("%q is not known", what)
	}
	for _, name := range names {
		if err := each(name); err != nil {
			return err
		}
	}
	return nil
}

func cat(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(os.Stdout, f)
	return err
}

func sum(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	fmt.Printf("%x  %s\n", h.Sum(nil), name)
	return nil
}

func stat(name string) error {
	var st syscall.Stat_t
	if err := syscall.Stat(name, &st); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	fmt.Printf("%d:%d %s\n", st.Uid, st.Gid, name)
	return nil
}

func touch(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return f.Close()
}
