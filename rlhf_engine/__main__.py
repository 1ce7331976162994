from rlhf_engine.cli import main

raise SystemExit(main())
