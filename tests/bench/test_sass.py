"""The reader of SASS and the walk through it, on short pieces of machine code as nvdisasm prints it; the tables."""

import compiled
import pytest
from cuda_host import kernel_names

from benchmarks.sass import sass, sass_report, sass_tables, sass_walk
from benchmarks.sass.sass_report import Row, Signature


def kernel(code: str, name: str = "kernel") -> sass.Kernel:
    """Of lines "label:" and "guard opcode operands"."""
    lines, address = [f".text.{name}:"], 0
    for line in filter(None, map(str.strip, code.splitlines())):
        if line.endswith(":"):
            lines.append(line)
            continue
        guard, text = line.split(" ", 1) if line.startswith("@") else ("", line)
        lines.append(f"        /*{address:04x}*/ {guard:>18} {text.strip()} ;")
        address += 16
    (found,) = sass.parse("\n".join(lines))
    return found


DIVERGENT = kernel("""
        MOV R0, RZ
.L_loop:
        LDS R4, [R9]
        BRA.DIV UR11, `(.L_apart)
        SHFL.BFLY PT, R5, R4, 0x1, 0x1f
.L_back:
        FADD R0, R0, R5
        IADD3 R9, R9, 0x4, RZ
        ISETP.NE.AND P0, PT, R9, R8, PT
   @P0  BRA `(.L_loop)
        EXIT
.L_apart:
        WARPSYNC.COLLECTIVE R2, `(.L_last)
        SHFL.BFLY P1, R5, R4, R6, R7
        ENDCOLLECTIVE
.L_last:
        MUFU.RCP R5, R5
        BRA `(.L_back)
""")

NESTED = kernel("""
        MOV R0, RZ
.L_outer:
        MOV R1, RZ
.L_inner:
        FADD R1, R1, R2
        IADD3 R3, R3, -0x1, RZ
        ISETP.NE.AND P0, PT, R3, RZ, PT
   @P0  BRA `(.L_inner)
        FADD R0, R0, R1
   @P1  BRA `(.L_rare)
.L_on:
        ISETP.NE.AND P2, PT, R0, RZ, PT
   @P2  BRA `(.L_outer)
        EXIT
.L_rare:
        FMUL R0, R0, R4
        BRA `(.L_on)
""")


def test_instructions_are_read():
    one = kernel("@!UP1 UIADD3 UR4, UP0, UR6, -0x1, URZ").instructions[0]
    assert (one.address, one.guard, one.opcode, one.kind) == (0, "@!UP1", "UIADD3", "UIADD3")
    assert one.operands == "UR4, UP0, UR6, -0x1, URZ"
    jump = '        /*9f10*/                   BRX R2 -0x9f20      (*"BRANCH_TARGETS .L_x_1,.L_x_6"*);'
    text = "\n".join([".text.k:", ".L_x_1:", jump, ".L_x_6:"])
    (jump,) = sass.parse(text)[0].instructions
    assert (jump.address, jump.operands, jump.targets) == (0x9F10, "R2 -0x9f20", (".L_x_1", ".L_x_6"))


def test_what_follows_a_block():
    after = {block.instructions[0].opcode: block.after for block in DIVERGENT.blocks}
    assert len(DIVERGENT.blocks) == 7
    assert after == {"MOV": (1,), "LDS": (2, 5), "SHFL.BFLY": (3,), "FADD": (4, 1), "EXIT": (),
                     "WARPSYNC.COLLECTIVE": (6,), "MUFU.RCP": (3,)}  # fmt: skip


def test_a_loop_has_the_code_behind_its_end():
    (loop,) = DIVERGENT.loops
    assert loop.blocks == {1, 2, 3, 5, 6}
    assert [one.opcode for one in DIVERGENT.own(loop)].count("BRA.DIV") == 1


def test_loops_inside_are_left_out():
    outer, inner = NESTED.loops
    assert NESTED.inner(outer) == [inner]
    assert [one.kind for one in NESTED.own(inner)] == ["FADD", "IADD3", "ISETP", "BRA"]
    assert [one.kind for one in NESTED.own(outer)] == ["MOV", "FADD", "BRA", "ISETP", "BRA", "FMUL", "BRA"]


def test_the_usual_way_leaves_no_lane_behind():
    (loop,) = DIVERGENT.loops
    kinds = [one.opcode for one in sass_walk.usual_way(DIVERGENT, loop)]
    assert kinds == ["LDS", "BRA.DIV", "SHFL.BFLY", "FADD", "IADD3", "ISETP.NE.AND", "BRA"]


def test_the_usual_way_passes_inner_loops_and_rare_code_by():
    outer, _ = NESTED.loops
    assert [one.kind for one in sass_walk.usual_way(NESTED, outer)] == ["MOV", "FADD", "BRA", "ISETP", "BRA"]


CHOICES = """
.L_loop:
        {test}
  {guard} BRA `(.L_other)
        FADD R0, R0, R1
        FADD R0, R0, R1
        FADD R0, R0, R1
.L_on:
   @P6  BRA `(.L_loop)
        EXIT
.L_other:
        {other}
        BRA `(.L_on)
"""


@pytest.mark.parametrize(
    ("test", "guard", "other", "way"),
    [
        ("FSETP.GT.AND P0, PT, R0, RZ, PT", "@P0", "FMUL R0, R0, R0", "other"),  # it is shorter
        ("VOTE.ANY P0, P1", "@P0", "FMUL R0, R0, R0", "here"),  # no lane is found
        ("VOTE.ANY P0, P1", "@!P0", "FMUL R0, R0, R0", "other"),
        ("FCHK P0, R3, R5", "@P0", "CALL.REL.NOINC `($slow)", "here"),
        ("FCHK P0, R3, R5", "@P0", "MUFU.RCP R0, R0\nFADD R0, R0, R0\nFADD R0, R0, R0", "other"),
    ],
)
def test_which_of_two_ways(test, guard, other, way):
    found = kernel(CHOICES.format(test=test, guard=guard, other=other))
    kinds = [one.kind for one in sass_walk.usual_way(found, found.loops[0])]
    assert ("FADD" in kinds[:3]) == (way == "here")


def test_a_loop_whose_ways_are_all_rare_is_named():
    found = kernel("MOV R0, RZ\n.L_loop:\nCALL.REL.NOINC `($slow)\n@P0 BRA `(.L_loop)\nEXIT", "slow")
    with pytest.raises(ValueError, match="slow: every way"):
        sass_walk.walk(found, found.loops[0])


@pytest.mark.parametrize(
    ("text", "reads", "writes"),
    [
        ("FFMA R3, -R10.reuse, |R7|, R3", "R10 R7 R3", "R3"),
        ("IADD3 R31, P1, R18, R31, RZ", "R18 R31", "R31 P1"),
        ("IADD3.X R5, RZ, R15, RZ, P0, !PT", "R15 P0", "R5"),
        ("IMAD.WIDE.U32 R2, R5, R8, R2", "R5 R8 R2 R3", "R2 R3"),
        ("DFMA R0, R2, R4, R6", "R2 R3 R4 R5 R6 R7", "R0 R1"),
        ("ISETP.GE.AND.EX P0, PT, R0, UR7, PT, P1", "R0 UR7 P1", "P0"),
        ("FCHK P0, R3, R5", "R3 R5", "P0"),
        ("SHFL.BFLY P1, R5, R4, R6, R7", "R4 R6 R7", "P1 R5"),
        ("VOTE.ANY P0, P1", "P1", "P0"),
        ("VOTE.ANY R3, PT, P1", "P1", "R3"),
        ("LDS.128 R4, [R9+0x10]", "R9", "R4 R5 R6 R7"),
        ("LDG.E.64 R12, desc[UR6][R18.64]", "UR6 R18 R19", "R12 R13"),
        ("STG.E desc[UR6][R6.64], R67", "UR6 R6 R7 R67", ""),
        ("STS.64 [R1], R8", "R1 R8 R9", ""),
        ("HMMA.1688.F32.TF32 R0, R4, R8, RZ", "R4 R5 R6 R7 R8 R9", "R0 R1 R2 R3"),
        ("@P2 FADD R1, R2, R3", "R2 R3 P2 R1", "R1"),
        ("SEL R4, R3, R10, !P2", "R3 R10 P2", "R4"),
        ("BRA `(.L_x_1)", "", ""),
    ],
)
def test_what_an_instruction_reads_and_writes(text, reads, writes):
    access = sass_walk.access(kernel(text).instructions[0])
    assert set(access.reads) == set(reads.split())
    assert set(access.writes) == set(writes.split())


def cycles(code: str) -> tuple[int, int]:
    found = kernel("MOV R0, RZ\n.L_loop:\n" + code + "\n@P0 BRA `(.L_loop)\nEXIT")
    turn = sass_walk.walk(found, found.loops[0])
    return turn.in_order, turn.chain


def test_the_chain_is_what_a_turn_waits_of_the_one_before():
    assert cycles("FADD R0, R0, R1") == (4, 4)
    assert cycles("FADD R0, R0, R1\nFMUL R0, R0, R2") == (8, 8)
    assert cycles("SHFL.BFLY PT, R1, R0, 0x1, 0x1f\nFADD R0, R0, R1") == (29, 29)
    assert cycles("LDS R1, [R2]\nFADD R0, R0, R1") == (32, 4)  # nothing waits for the turn before but a sum
    assert cycles("FADD R1, R0, R2\nFADD R3, R0, R2\nFADD R4, R0, R2") == (4, 0)  # one issues each cycle


def test_a_barrier_waits_for_all():
    in_order, chain = cycles("MUFU.RCP R1, R2\nBAR.SYNC.DEFER_BLOCKING 0x0")
    assert in_order >= 30
    assert chain >= 30


ROW = Row(100, 0, 0, 0, 1, 1, 200, 100, 250, 60, "steps", "forward_kernel<Layout<4, 3>, float, StandardFlow>")
ALONE = ROW._replace(loop="-", kernel="finish_kernel<float>", steps=0, instructions=0, usual=0, cycles=0, chain=0)


def test_a_table_is_read_as_it_was_written():
    text = sass_report.text_of([ROW, ALONE], {"nvcc": "V13.0.88"})
    assert sass_report.read(text) == ([ALONE, ROW], {"nvcc": "V13.0.88"})
    assert max(map(len, text.splitlines())) < 200


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"registers": 105, "cycles": 262, "chain": 63}, ""),
        ({"registers": 106}, "regs 100 -> 106"),
        ({"instructions": 211}, "instr 200 -> 211"),
        ({"usual": 106}, "usual 100 -> 106"),
        ({"cycles": 263}, "cycles 250 -> 263"),
        ({"chain": 64}, "chain 60 -> 64"),
        ({"spilled": 8}, "spill 0 -> 8"),
        ({"divergent": 1}, "div 0 -> 1"),
        ({"elsewhere": 2}, "other 1 -> 2"),
        ({"steps": 2, "instructions": 400, "usual": 200, "cycles": 500, "chain": 120}, ""),
        ({"registers": 90, "cycles": 100}, ""),
        ({"loop": "?", "steps": 0, "registers": 106}, "regs 100 -> 106"),
        ({"loop": "?", "steps": 0, "divergent": 0}, ""),
        ({"loop": "again"}, "no such loop"),
        ({"kernel": "new_kernel<float>"}, "new_kernel<float> is not in the table"),
    ],
)
def test_what_is_worse_than_the_table(changes, said):
    found = sass_report.worse([ROW._replace(**changes), ALONE], [ROW, ALONE])
    assert said in "\n".join(found)
    assert bool(found) == bool(said)


def test_one_more_divergent_branch_among_many_is_seen():
    now, then = ROW._replace(divergent=41), ROW._replace(divergent=40)
    assert sass_report.worse([now], [then]) == [f"{ROW.name}: div 40 -> 41"]


def test_a_kernel_that_is_gone_is_named():
    assert sass_report.worse([ROW], [ROW, ALONE]) == ["finish_kernel<float> is in the table and was not compiled"]


def test_another_compilers_figures_are_not_compared(monkeypatch):
    monkeypatch.setattr(sass_report, "disassembler", dict)
    monkeypatch.setattr(sass_tables, "versions", lambda *_: {"nvcc": "V1.2.3"})
    with pytest.raises(pytest.skip.Exception, match=r"sass_cuda.txt was made with .*V13.* here is .*V1\.2\.3"):
        compiled.table_of("cuda")
    monkeypatch.setattr(sass_report, "disassembler", lambda: None)
    with pytest.raises(pytest.skip.Exception, match="not installed"):
        compiled.table_of("cuda")


def test_make_sass_writes_the_table_and_says_what_became_worse(monkeypatch, tmp_path, capsys):
    rows = [ROW, ALONE]
    monkeypatch.setattr(sass_report, "disassembler", dict)
    monkeypatch.setattr(compiled, "compile_cuda", lambda folder, architectures: [])
    monkeypatch.setattr(sass_tables, "TABLES", {"cuda": tmp_path / "cuda.txt"})
    monkeypatch.setattr(sass_tables, "versions", lambda *_: {"nvcc": "V13.0.88"})
    monkeypatch.setattr(sass_tables, "rows_of_objects", lambda *_: rows)
    sass_tables.main(["cuda"])
    assert ROW.kernel in capsys.readouterr().out
    rows[0] = ROW._replace(registers=120)
    sass_tables.main(["cuda"])
    assert "regs 100 -> 120" in capsys.readouterr().out
    assert sass_report.read((tmp_path / "cuda.txt").read_text())[0] == [ALONE, rows[0]]


def test_a_loop_is_known_by_its_instructions():
    signature = Signature(("steps", "again"), "FADD -SHFL")
    assert [name for name, _ in sass_report.loops_over_steps(NESTED, signature)] == ["steps", "again"]
    assert sass_report.loops_over_steps(DIVERGENT, signature) == []
    (row,) = sass_report.rows_of(DIVERGENT, "kernel<float>", (8, 0, 0), {"kernel": Signature(("steps",), "SHFL LDS")})
    assert (row.divergent, row.elsewhere, row.instructions, row.usual) == (1, 0, 12, 7)
    (row,) = sass_report.rows_of(DIVERGENT, "other<float>", (8, 0, 0), {})
    assert (row.loop, row.divergent, row.elsewhere) == ("-", 0, 1)


def test_kernels_have_readable_names():
    mangled = (
        "_ZN4vvae4cuda53_GLOBAL__N__8fcdc3fd_20_amortized_forward_cu_c3a4437b24amortized_forward_kernel"
        "INS0_6LayoutILi32ELi8EEENS0_7float16ENS0_12StandardFlowEEEvNS0_11ForwardViewIT0_T1_EE"
    )
    readable = "amortized_forward_kernel<Layout<32, 8>, float16, StandardFlow>"
    assert sass_report.readable([mangled, "direct_forward_kernel"]) == [readable, "direct_forward_kernel"]
    assert not sass_report.USUAL.fullmatch(readable)
    assert sass_report.USUAL.fullmatch(readable.replace("float16", "float"))


def test_the_cuda_table_has_every_kernel_and_no_spill():
    rows, versions = sass_report.read(sass_report.TABLES["cuda"].read_text())
    assert set(versions) == {"nvcc", "cuobjdump", "nvdisasm"}
    assert {row.kernel.split("<")[0] for row in rows} == kernel_names()
    assert [row.kernel for row in rows if row.spilled] == []
    for name, signature in sass_report.LOOPS.items():
        of_kernel = [row for row in rows if row.kernel.split("<")[0] == name and row.loop != sass_report.UNREAD]
        assert {row.loop for row in of_kernel} == set(signature.names)
        assert all(row.usual and row.cycles for row in of_kernel)


def test_the_triton_table_has_every_loop_and_no_spill():
    rows, versions = sass_report.read(sass_report.TABLES["triton"].read_text())
    assert set(versions) == {"triton", "cuobjdump", "nvdisasm"}
    assert [row.kernel for row in rows if row.spilled] == []
    assert {row.kernel.split("<")[0] for row in rows} == {*sass_report.TRITON_LOOPS, "compact_finish_kernel"}
