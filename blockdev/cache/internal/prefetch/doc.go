// Package prefetch decides when a node may ask for chunks that no read waits for, and
// for how many bytes. Time goes in and a decision comes out: the package fetches
// nothing, and knows of no diff and no file but /proc/pressure/cpu.
//
// # Every knob that keeps prefetch out of the way of reads
//
// There are three priorities (blockdev.Priority): demand (a read waits for it), startup
// (a container is about to read it) and prefetch. A byte of prefetch passes the
// following, in this order. "Here" is this package. A test
// checks that the names exist.
//
// On the node, before a request (Pace.Next is from Rate to Inflight):
//
//	blockdev/volume Config.PrefetchDiffs    layers at a time (2). Layers wait for layers; proofs wait for
//	                                        prefetch, and scrubs for proofs
//	blockdev/cache local.paceWrites         waits for the disk, if too much is written and not synced
//	                                        (4 times Config.SyncBytes)
//	blockdev/cache Diff.prefetchRoom        stops before the quota and the disk are full: demand reads and
//	                                        indexes have what is left
//	here Rate                               prefetch_rate, bytes a second of the whole node. Not for layers
//	                                        that a caller waits for (Diff.Hurry)
//	here Gate.crowded                       while containers start and the processors have too much to do
//	                                        (/proc/pressure/cpu): a request, or a MiB of a proof or scrub, once
//	                                        in GiveWay. Until 20 s after the last start, and for a minute in two;
//	                                        not while a caller waits for all of any layer
//	here Gate                               waits for all demand reads of the node, until there was none for
//	                                        Config.Quiet (500 ms), and for startup; waits while a container
//	                                        that starts reads what it has not read before (2 s). It waits
//	                                        Config.GiveWay (1 s) at most, and not for layers for which
//	                                        nothing has come for 10 s
//	here Trickle                            after GiveWay without quiet: the request takes a hundredth of
//	                                        the link's time
//	here Inflight                           waits for prefetch: bytes asked for and not here. How many may
//	                                        be is Config.Inflight: 2 MiB for each level of the largest group's
//	                                        tree (p2p/swarm Swarm.Inflight), 4 MiB where there are no peers
//
// On the node, while the request goes out:
//
//	blockdev/chain Step.PrefetchAfter       a registry gets no prefetch until the supernode has brought
//	                                        nothing for a minute
//	p2p/swarm firstView                     waits up to 500 ms, once for a group, for the list of its members
//	p2p/exchange Options.Prefetch           streams of its own for each priority: demand waits for no stream
//	                                        that prefetch has
//	p2p/exchange LinkWindow                 bytes of prefetch on their way to this machine from all others;
//	                                        finds the smallest size that costs no throughput. While there
//	                                        are demand requests, and 50 ms after them: one chunk
//	p2p/exchange Options.Download           max_download (package blockdev/pace): demand, startup, prefetch
//
// On the machine that is asked, a peer or a supernode:
//
//	p2p/swarm errReaders                    a peer with demand reads of its own fetches nothing for others'
//	                                        prefetch; it says so, and another one is asked
//	p2p/exchange Limits.PrefetchPerPeer     requests that are worked on, by kind, of one peer and of all;
//	                                        what is above is answered busy
//	p2p/exchange Limits.PrefetchReads       chunks that are read from the store for prefetch and startup
//	p2p/exchange Limits.DemandPause         before each chunk, prefetch waits for the same peer's demand
//	                                        requests, 50 ms at most; startup 5 ms (Limits.StartupPause)
//	p2p/exchange ServerConfig.Upload        max_upload (package blockdev/pace): demand, startup, prefetch; in
//	                                        turns among peers. Limits.PrefetchBacklog (1 s, of a supernode
//	                                        30 s) is how long a request may have to wait
//
// The other way round, what prefetch and startup have asked for may hold a read up that
// comes a moment later:
//
//	blockdev/cache Config.Promote           such a read waits 50 ms for a chunk that prefetch has asked for,
//	                                        and then has it asked for again with demand priority
//	here Arrivals                           it waits 10 times as long for a chunk of a startup request, as
//	                                        long as startup chunks keep coming
//	here Sequences                          read-ahead goes out with a demand request, and grows for
//	                                        programs that read on
//	here Rest                               proofs and scrubs of local data rest as long as they have
//	                                        worked, for Gate.crowded too, and wait at the Gate
//
// Package blockdev/turns is not on the list: it shares what demand reads hold among
// layers, and prefetch takes none of that.
//
// # Invariants
//
//   - Prefetch always gets on: each wait for reads has an end.
//   - Nothing here waits with a lock.
package prefetch
