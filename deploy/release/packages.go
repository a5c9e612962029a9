package main

import (
	"embed"
	"os"
)

// What both formats say.
const (
	packageName = "shoal"
	maintainer  = "The shoal authors <https://github.com/shoalfs/shoal>"
)

//go:embed scripts
var scripts embed.FS

// script returns one of the scripts that both formats run.
func script(name string) (string, error) {
	text, err := scripts.ReadFile("scripts/" + name)
	return string(text), err
}

// packaged is what a package has on the machine: a tree below /usr, and the
// directory of configs, which is empty. An operator's files in it belong to the
// operator, and no package ever writes them.
func packaged(tree []entry) []entry {
	all := []entry{{Name: "etc/shoal/", Mode: 0o755}}
	for _, e := range tree {
		e.Name = "usr/" + e.Name
		all = append(all, e)
	}
	return all
}

// content returns the bytes of a file.
func (e entry) content() ([]byte, error) {
	if e.From == "" {
		return e.Data, nil
	}
	return os.ReadFile(e.From)
}
