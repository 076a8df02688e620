//! Mended faults of this program that a test can put back, for a thread or (workers and daemons of
//! the lab) for a process: the crate `mutants` says how.
//!
//! Of a few faults of the FUSE data path, somebody has to run a trial with the fault to see that it is
//! found (`NAMED` in src/fuse/simulation/mutants.rs).

mutants::list! {
    /// A mount whose device number a FUSE volume once had is taken for that volume.
    NumbersAreVolumes,
    /// A version over which this kernel and the server do not go together is mounted all the same.
    TrapsAreMounted,
    /// A look at the other hosts forgets how long an earlier one of this host's name is silent.
    NamesakesAreForgotten,
    /// After a restart a host does not know from which directory it has read a restored record.
    DirectoriesAreForgotten,
    /// Of two answers about a file the kernel keeps the one that came first, also if it is older.
    KernelMissesChanges,
    /// What waiting writers write is copied however much that is.
    CopiesUnbounded,
    /// The kernel is never made to forget files: a worker's memory grows with each file seen.
    NothingIsForgotten,
    /// What lies behind the first call's bytes of a large write waits until it is forced out.
    RestsWaitToBeForced,
    /// Small pieces that are held count as their bytes only, whatever else they take.
    PiecesCostNothing,
    /// Who waits for memory walks all files that are open, not those that something is held of.
    WaitersWalkAllFiles,
    /// A name that is seen again is taken for new: all names of its file are gone through.
    NamesSeenAgainAreNew,
    /// Whether a file is open whose name goes, and that opens wait for it, are two steps.
    TargetsInTwoSteps,
    /// A file's bytes that become durable while a READ of it is under way are never given back.
    HeldLeaksBesideReads,
    /// fsync through a descriptor for reading makes nothing durable.
    FsyncOfWritersOnly,
    /// It makes it durable, but tells of no error.
    ErrorsForWritersOnly,
    /// Who is killed while he waits for a WRITE that is on the wire takes it back: the next one goes
    /// out beside it, and may arrive before it.
    KilledCallsAreTakenBack,
    /// A wait in which nothing moves goes on after `io_timeout`.
    WaitsNeverEnd,
    /// Whether a write appends, and whether it is to be durable, is looked up in the flags of the
    /// open (of which only O_DIRECT counts), not in those of the request.
    FlagsOfTheOpen,
    /// The kernel checks mode bits also where the server makes everybody one user.
    ModeBitsAlone,
    /// Who is killed while the server does not answer waits on.
    DeafToKills,
    /// A process that outlives the daemon is known by its number: what was left of one before a
    /// power failure names another volume's, which is waited for and killed.
    AttendantByNumber,
    /// A file that another host made first is opened with the attributes from before the open.
    CreateTellsOldAttributes,
    /// Bytes that are durable, and kept for an earlier READ, lie over the answers to later ones.
    DurableHidesOthers,
    /// A FUSE worker is told of a prolonged right only after its start, which waits for it.
    StartHearsNothing,
    /// SETATTR and LINK take what another host changed before them for their own doing.
    SetattrHidesOthers,
    /// WRITE and COMMIT do.
    WriteHidesOthers,
    /// A few bytes that are left of a large write keep all of it in memory.
    PartsKeepTheWhole,
    /// What overwrites bytes that are under way takes over their mark, so that whoever waits for
    /// it waits as long as somebody overwrites them.
    HeirsTakeOverMarks,
    /// A file that was written is not one of those to be synced any more when the last file of
    /// its node id comes to rest.
    DirtyByNodeId,
    /// A part of an append waits for the end of the file before its turn, and later parts pass it.
    AppendsAskBeforeTheirTurn,
    /// The kernel keeps the page that an append went past.
    AppendsKeepPages,
    /// An append through the page cache waits until the kernel has dropped the page that it locks
    /// until the append is answered.
    AppendsWaitForTheirPage,
    /// A writer that waits for room waits on because pieces of what is held are split and joined.
    JoinedRoomIsGivenBack,
    /// What a name led to before a rename of this host is believed when it is heard after that.
    OldAnswersName,
    /// An open beside the removal of a file's hidden name, after its last close, does not wait for it.
    HiddenGoesUnseen,
    /// An open counts only when the server has granted it.
    OpenInFlightIsNone,
    /// An open beside an own call on the file leaves the kernel the size that it knows, although the
    /// server has told another one.
    DoubtsKeepSizes,
    /// A rename that fails leaves its open target under a hidden name.
    FailedRenameDeletes,
    /// The target of a rename that has failed, and could not be looked up after that, is deleted.
    RenameOfUnknownOutcomeDeletes,
    /// A rename that is not answered is taken for refused: what it has replaced all the same is not
    /// kept for who has it open, and an empty directory that it has moved is deleted.
    UnansweredRenamesAreRefused,
    /// An open that came too late is tried again while a rename is under way that does not know of
    /// it, and comes too late again.
    LateOpensDoNotWait,
    /// A call that came too late for what a name led to leaves no trace.
    LateLooksAreForgotten,
    /// Names are made beside a rename into the same directory whose program was killed, and which
    /// replaces them when the server gets to it.
    KilledRenamesReplaceLater,
    /// Names are looked up beside a rename or unlink whose program was killed, and believed.
    LooksPassKilledChanges,
    /// A directory may be forgotten, and known anew, while its names are changed.
    ChangedDirsAreForgotten,
    /// A listing tells as known what it was told before a rename or unlink of this host.
    ListingsOutliveChanges,
    /// When a program is killed in a rename or unlink, opens no longer wait for its outcome.
    KilledRenamesAreForgotten,
    /// A file is written to beside a truncate whose program was killed, and which takes that away when
    /// the server gets to it.
    KilledCutsComeLater,
    /// What is known of a file stays good when an own call ends with an unknown outcome.
    LostCallsChangeNothing,
    /// Or is good again with the next answer, also one that was asked for before that.
    OldAnswersEndDoubts,
    /// A Remove makes `.nfsvol/` on the share of data that it leaves alone.
    RemoveTouchesEveryShare,
    /// A Remove looks for other users of its directory in its own list of volumes only.
    RemoveTrustsItsList,
    /// A restore looks who uses a place before it moves data away from there, and not afterwards.
    PlacesAreAskedForFirst,
    /// A late removal moves data to a volume's place that another host deletes or restores elsewhere.
    DataGoesBackUnasked,
    /// Only another volume of its name is kept out by an exclusive one.
    ExclusiveByName,
    /// One server under two names is two servers.
    ServersByName,
    /// A directory that a new volume has found is there still when no removal of another one is seen.
    FoundIsThereForEver,
    /// A directory that has taken the place of a removed one is removed as well.
    RemovedUnseen,
    /// A data directory is known by the number that it had before it was put in place.
    FileIdOfBeforeTheRename,
    /// A Create is taken back by name, whoever has the volume.
    UndoneByName,
    /// An entry of the trash is as old as the server's clock says.
    TrashTrustsTheServersClock,
    /// An entry of the trash whose record bears another name cannot be read.
    TrashKnowsOneName,
    /// Two hosts that restore one entry write its new name into the same record.
    RestoresShareADirectory,
    /// A restored exclusive volume comes back without its claims, so that epochs begin anew.
    RestoredClaimsBeginAnew,
    /// A restore that has lost its entry keeps what it has taken from the volume of whoever has it.
    DataIsFetchedFromVolumes,
    /// A retained directory is looked for under the name that its volume is restored to.
    RetainedMovesByName,
    /// A Create that was cut off while it brought a removed volume back with other options makes an empty one when it
    /// is done again, since the record has these options by then.
    RecreatesBeginAnew,
    /// What it was about to bring back with `on_remove=delete` is deleted from the trash.
    TakenIsDeletedAtOnce,
    /// It takes what a restore is about to bring back elsewhere.
    RecreatesTakeRestores,
    /// It is undone like one that has made the volume.
    RecreatesAreUndone,
    /// An exclusive volume that is made anew as a shared one loses its claims, and is made anew as an exclusive one.
    RecreatedClaimsBeginAnew,
    /// A restore does not look whether what it has published is whole.
    RestoredUnseen,
    /// A restore deletes what it has taken before it has published what comes back.
    RestoreDeletesFirst,
    /// A host that was held up in a removal takes what another one has restored meanwhile for what it removes.
    RestoredIsRemovedAgain,
    /// A restore that was published in part puts back whatever has the name by then.
    PutBackUnseen,
    /// A claim counts wherever it was made, also in a directory that a restore has deleted.
    ClaimsAreNotLookedFor,
    /// What hosts that were killed while they set a share up have left stays.
    SetUpsStay,
    /// What cannot be deleted keeps all that comes after it.
    SweepEndsAtTheFirstError,
    /// A directory of a server without READDIRPLUS cannot be listed.
    ReaddirplusOnly,
    /// A listing ends with an error when the server does not know its cookie any more.
    BadCookieEnds,
    /// A listing ends, as if it were whole, at an answer without entries that says there are more.
    EmptyAnswersEnd,
    /// A file whose id needs 64 bits has another node id each time.
    HighFileIdsAreOwn,
    /// Without attribute caches no file can be mapped shared on a kernel before 6.6.
    UncachedIsUnmapped,
    /// A token that stands behind, because its server forgot renewals, is an error for ever.
    TokenBehindIsAnError,
    /// A host's document and claims are not looked at again after an error or a gap.
    ForgottenStaysForgotten,
    /// A session whose token is not there is over, and an empty share holds nothing.
    AbsenceEndsSessions,
    /// The renewal of a session waits until a claim, a look or a document is done.
    RenewalWaitsForCalls,
    /// A renewal that is not answered is sent again when the next one is due.
    RenewalIsNotTriedAgain,
    /// Whoever makes an epoch has the volume, even if a higher one is there by then.
    EpochMadeAnewWins,
    /// The documents of a host's next process have the numbers of those that the server forgot.
    DocumentNumbersComeAgain,
    /// Stamps of whole seconds are taken for exact.
    WholeSecondsAreExact,
    /// A document or a claim that cannot be read stops its host or its volume.
    TornFilesStay,
    /// An epoch whose claim is missing is taken for one that is being removed, for ever.
    ClaimsWithoutFileStay,
    /// A host puts a claim of its own that the server has lost over another host's that has come since.
    OwnClaimReplaces,
    /// Of the hosts that want an exclusive volume, whoever looks first has it.
    WhoeverIsFirst,
    /// While the disk is slow that takes what a call writes of a volume, all calls wait.
    SlowDiskStopsAll,
    /// A worker that is stopped keeps the calls of all volumes waiting that were unmounted with its own.
    StoppedWorkerStopsOthers,
    /// Where the directory of all records is away, each volume that is asked for is gone.
    NoListNoVolume,
    /// A volume whose options have changed while its claim was waited for is mounted by the old ones.
    ClaimsKeepOptions,
    /// A volume that is known is there, whatever another host has done since.
    KnownIsThere,
    /// A Get waits twice: for the way to the share, and for its answer.
    GetWaitsTwice,
    /// Each of Podman's commands is the start of an engine, whose earlier mounts count for nothing.
    CommandsAreEngines,
    /// The home share's word on an exclusive volume is waited for no longer than on others.
    ExclusiveWaitsNoLonger,
    /// A Create that finishes a removal looks for its data on the share that it was itself asked for.
    RemovalsEndOnTheNewShare,
    /// An attachment stays when its volume cannot be unmounted, and nobody asks for that again.
    FailedUnmountStays,
    /// A process whose program's file has been replaced is one of another program.
    OldProgramIsAnother,
    /// A fence kills an engine that copies into the volume, where the engine runs in a container.
    NestedEngineIsKilled,
    /// A container that nfsvol runs in itself is killed as one that has the volume.
    OwnContainerIsKilled,
    /// A fence is done while the kernel still works for what it killed.
    KilledCallsAreOver,
    /// A process whose main thread has ended while others go on is seen by nobody.
    MainThreadIsAll,
    /// A fence is done although what was written could not be thrown away.
    NothingThrownAwayIsDone,
    /// A container that has a bind of the volume by which the host shows it too is taken for a service
    /// with a copy of the host's mounts.
    BindsAreTheHosts,
    /// Of several killed processes that are within calls, the last one is waited for.
    LastCallIsWaitedFor,
    /// A volume that is listed, and whose record cannot be read, is none where there is no copy.
    UnreadIsAbsent,
    /// A volume that was made anew meanwhile is forgotten with the one that is gone.
    ForgottenByName,
    /// A volume whose record is missing, in its directory of the catalog, has been removed.
    NoRecordNoVolume,
    /// A session begins on a share whose `format.json` is torn, and knows it by that.
    TornFormatIsOne,
    /// A removal is marked by name, whatever has the name by now and whoever has used it.
    MarkedUnseen,
    /// A document that says what this host would tell is good, although it is an earlier one.
    BehindIsEqual,
    /// Of a silent host without a token the proof of its end is put there, beside which it may put
    /// its token.
    ProofWithoutToken,
    /// How long another host was silent counts on when the server has forgotten its renewals.
    SilenceOutlivesForgetting,
    /// A daemon that has just started holds no exclusive volume, whatever its session says.
    GoingOnIsSeenLate,
}
