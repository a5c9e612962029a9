// Package deploy has the unit files of systemd, for programs that install them.
package deploy

import _ "embed"

// NodeUnit is the unit file of the node. Its program is ProgramPath, and it requires the disk
// that has NodeRoot.
//
//go:embed shoal-node.service
var NodeUnit string

const (
	// NodeUnitName is the name of NodeUnit.
	NodeUnitName = "shoal-node.service"
	// UnitDir is for unit files of the operator and of the chart. Packages have theirs in
	// /usr/lib/systemd/system, and those in UnitDir count before them.
	UnitDir = "/etc/systemd/system"
	// ProgramPath is where the unit files look for the program.
	ProgramPath = "/usr/local/bin/shoal"
	// NodeRoot is the root of a node whose config names no other one.
	NodeRoot = "/var/lib/shoal"
)
