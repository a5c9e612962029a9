// Package cells divides the members of an image's group into cells, and says what each
// member is to be told. It is pure: it does no I/O, has no clock and starts no goroutine,
// so that the simulator (bench/cmd/sim) measures the supernode's own code.
//
// # Terms
//
//   - group: the nodes that have one image's indexes.
//   - cell: a part of a group, within one zone, of 256 members at most; racks stay
//     together where there is room. All members of a cell get the same.
//   - zone: a free label of a node. A group tells MaxZones of them apart: members of
//     further ones are in the common zone, with those that have none.
//   - seat: a member's place in a group.
//   - gateways: those members of a cell that the members of another one know: up to 8
//     of them, fewer where there are more than 256 cells. They follow from the members
//     of the cell (and which the other one is) alone, so they are the same after a
//     restart.
//   - have: what a node says that it knows of the group from before, cell by cell, as
//     sums. It gets only what has changed.
//
// # How it is used
//
// A Group is changed (Add, Remove, Ask, SetFull, SetMember) and collected from under its
// owner's lock; what Collect returns is encoded and sent without it:
//
//	lock; u := g.Collect(receiver); unlock
//	failed, err := u.Send()
//	lock; g.Failed(failed); unlock
//
// Send must end before the next Collect of that group, so that messages keep their order.
//
// # Invariants
//
//   - After a flush each member that has been sent to knows all of its cell and the
//     gateways of each other one, for each list that it said that it had.
//   - Collect costs in the order of the cells, and of the members of those that are sent
//     something; what is encoded is encoded once for a cell.
//   - No message is longer than wire.MaxMemberEvent, for all labels and addresses
//     members have: a group has at most MaxSize members, and so 1,700 cells at the most.
package cells
