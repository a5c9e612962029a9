// Package deploy has the unit files of systemd, for programs that install them.
package deploy

import _ "embed"

// NodeUnit is the unit file of the node. Its program is ProgramPath.
//
//go:embed shoal-node.service
var NodeUnit string

// ProgramPath is where the unit files look for the program.
const ProgramPath = "/usr/local/bin/shoal"
